"""The image of a transformers checkpoint: its tensors found, checked, tied and laid out."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from computron.config import ModelConfig
from computron.errors import CheckpointError
from computron.models import skeleton
from computron.models.checkpoint import Source
from computron.models.images import CheckpointImage, LaidOutImage, StateImage, tensors_equal
from computron.models.layout import Layout, lay_out, model_stages, persistent_tensors
from computron.models.random_image import RandomImage
from computron.models.safetensors_file import FileTensor

logger = logging.getLogger(__name__)

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def plan_image(
    model: ModelConfig,
    source: Source,
    module: PreTrainedModel,
    dtype: torch.dtype,
    tensors: Mapping[str, FileTensor],
) -> tuple[Layout, LaidOutImage, frozenset[str]]:
    """Layout, bytes, and the names that no checkpoint holds. `module`: on the meta device; `tensors`: the files'.

    Raises CheckpointError, naming file, tensor and remedy, if they do not fit together.
    """
    dtypes = skeleton.target_dtypes(module, dtype)
    described = {name: (dtypes[name], tuple(tensor.shape)) for name, tensor in persistent_tensors(module)}
    if source.random or source.folder is None:
        layout = _layout(module, described, skeleton.resolve_ties(module, described, lambda a, b: True), frozenset())
        deviation = getattr(source.config.get_text_config(), "initializer_range", None) or 0.02
        return layout, RandomImage(layout, seed=model.seed, deviation=deviation), frozenset()
    names = skeleton.map_names(module, tensors)
    if names is None:
        logger.info("%s: loaded through transformers, which converts its tensors on the way", model.id)
        layout = _layout(module, described, skeleton.resolve_ties(module, {}, lambda a, b: True), frozenset())
        load = functools.partial(skeleton.load_state, model, source.folder, dtype)
        return layout, StateImage(layout, load), frozenset()
    held = {new: tensors[old] for old, new in names.items()}
    aliases = skeleton.resolve_ties(module, held, lambda a, b: tensors_equal(held[a], held[b]))
    _check_shapes(module, held, described)
    outside = _outside(source.folder, module, held, described, aliases)
    layout = _layout(module, described, aliases, outside)
    return layout, CheckpointImage(layout, {slot.name: held[slot.name] for slot in layout.slots}), outside


def _layout(
    module: PreTrainedModel, described: Described, aliases: Mapping[str, str], outside: frozenset[str]
) -> Layout:
    names = [name for name in described if name not in aliases and name not in outside]
    first = {aliases.get(name, name) for name in embedding_names(module)}
    return lay_out(model_stages(module, names, first), described, aliases)


def embedding_names(module: PreTrainedModel) -> list[str]:
    """Tensors of the input embedding, which is used first wherever it is registered."""
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model that embeds no tokens
        return []
    owned = {id(parameter) for parameter in embedding.parameters()} if isinstance(embedding, nn.Module) else set()
    return [name for name, tensor in persistent_tensors(module) if id(tensor) in owned]


def _check_shapes(module: nn.Module, held: Mapping[str, FileTensor], described: Described) -> None:
    for name, tensor in held.items():
        shape = described[name][1]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, {type(module).__name__} needs "
                f"{list(shape)}; the weights and config.json do not belong together"
            )


def _outside(
    folder: Path,
    module: PreTrainedModel,
    held: Mapping[str, FileTensor],
    described: Described,
    aliases: Mapping[str, str],
) -> frozenset[str]:
    """Names that the checkpoint may lack, because transformers computes them. Raises CheckpointError for any other."""
    missing = [name for name in described if name not in held and aliases.get(name, name) not in held]
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    computed = [re.compile(pattern) for pattern in module._keys_to_ignore_on_load_missing or ()]
    outside = {name for name in missing if name in buffers or any(pattern.search(name) for pattern in computed)}
    lacking = [name for name in missing if name not in outside]
    if lacking:
        rest = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{folder}: tensor {lacking[0]}{rest} of {type(module).__name__} is missing; "
            "fetch the checkpoint again, or choose the task that it was trained for"
        )
    return frozenset(outside)
