"""transformers' own module of a checkpoint on the meta device, and what goes into it: names, dtypes, ties, buffers."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as transformers_init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from computron.config import ModelConfig
from computron.errors import CheckpointError
from computron.models.checkpoint import in_words
from computron.models.layout import persistent_tensors

# Building changes torch's default dtype and transformers' tying for the whole process.
_building = threading.Lock()


def auto_class(model: ModelConfig, config: PretrainedConfig) -> Any:
    """The Auto class that builds this model for its task."""
    if model.task == "generate":
        return AutoModelForCausalLM
    if model.task == "embed":
        return AutoModel
    return AutoModelForImageClassification if is_image_model(config) else AutoModelForSequenceClassification


def is_image_model(config: PretrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def build(model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The module with every tensor on the meta device, untied, in evaluation mode.

    `attention`: a name known to transformers' attention interface; None leaves the choice to transformers.

    Raises CheckpointError if transformers has no such model for the task or refuses its config.
    """
    auto = auto_class(model, config)
    arguments: dict[str, Any] = {"trust_remote_code": True} if model.trust_remote_code else {}
    if attention is not None:
        arguments["attn_implementation"] = attention
    if model.task == "embed" and _takes_pooler(config):
        arguments["add_pooling_layer"] = False  # embeddings come from the hidden states
    no_ties = cast(Callable[[], AbstractContextManager[None]], transformers_init.no_tie_weights)
    try:
        with _building, torch.device("meta"), no_ties():
            module: PreTrainedModel = auto.from_config(copy.deepcopy(config), dtype=dtype, **arguments)
    except (ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'model "{model.id}": transformers cannot build a {config.model_type} model for {model.task}: '
            + in_words(error)
        ) from error
    nn.Module.eval(module)
    return module.requires_grad_(False)


def target_dtypes(module: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which each persistent tensor is held, with transformers' exceptions to the model's own."""
    plan: dict[str, torch.dtype] = module._get_dtype_plan(dtype)
    dtypes = {name: tensor.dtype for name, tensor in persistent_tensors(module)}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            if match := pattern.search(name):
                dtypes[name] = plan[by_group[cast(str, match.lastgroup)]]
    return dtypes


def map_names(module: PreTrainedModel, names: Iterable[str]) -> dict[str, str] | None:
    """Checkpoint name -> module name, for those that the module has; None if loading needs more than new names."""
    transforms = get_model_conversion_mapping(module)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = dict(persistent_tensors(module))
    prefix = module.base_model_prefix
    mapping: dict[str, str] = {}
    for name in sorted(names):
        renamed, converter = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, converter = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            continue
        if converter is not None:
            return None
        mapping[name] = renamed
    return mapping


def fill_outside(module: PreTrainedModel, missing: Iterable[str], device: torch.device) -> None:
    """Compute, as from_pretrained does, what no checkpoint holds: non-persistent buffers, and the tensors `missing`.

    Everything else stays on the meta device. Computed on the CPU, then moved, for the same bits everywhere.
    """
    missing = set(missing)
    outside: list[tuple[nn.Module, str]] = []
    for name, tensor in persistent_tensors(module):
        if name not in missing:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for prefix, owner in module.named_modules():
        owner._is_hf_initialized = False
        dot = prefix + "." if prefix else ""
        for name, value in (owner._parameters | owner._buffers).items():
            if value is not None and (name in owner._non_persistent_buffers_set or dot + name in missing):
                empty = torch.empty_like(value, device="cpu")
                setattr(owner, name, nn.Parameter(empty, requires_grad=False) if name in owner._parameters else empty)
                outside.append((owner, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cast(Any, module).initialize_weights()
    for owner, name in outside:
        value = getattr(owner, name).to(device)
        setattr(owner, name, nn.Parameter(value, requires_grad=False) if name in owner._parameters else value)


def resolve_ties(
    module: PreTrainedModel, present: Mapping[str, Any], same: Callable[[str, str], bool]
) -> dict[str, str]:
    """Alias -> name with the bytes, for each pair that the architecture ties.

    `present`: names that the checkpoint holds. `same`: whether two names that it both holds are equal; pairs that
    differ are not tied, as in transformers.
    """
    ties: dict[str, str] = dict(getattr(module, "all_tied_weights_keys", None) or {})
    groups: dict[str, list[str]] = {}
    for target, source in ties.items():
        groups.setdefault(source, [source]).append(target)
    aliases: dict[str, str] = {}
    for source, members in groups.items():
        held = next((name for name in members if name in present), source)
        for name in members:
            if name != held and (name not in present or same(name, held)):
                aliases[name] = held
    return aliases


def load_state(model: ModelConfig, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor as transformers' from_pretrained loads it: a second copy of the weights while it is held."""
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=model.trust_remote_code)
    try:
        with _building:
            module = auto_class(model, config).from_pretrained(
                str(folder), config=config, dtype=dtype, trust_remote_code=model.trust_remote_code
            )
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {in_words(error)}") from error
    return dict(persistent_tensors(module))


def _takes_pooler(config: PretrainedConfig) -> bool:
    classes = AutoModel._model_mapping
    if type(config) not in classes:
        return False
    found: Any = classes[type(config)]
    cls = found[0] if isinstance(found, tuple) else found
    return "add_pooling_layer" in inspect.signature(cls).parameters
