"""From a model's configuration to everything that is known of it before a byte of its weights is read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from computron.config import ModelConfig, Task
from computron.errors import CheckpointError
from computron.memory.images import ImageSource
from computron.models import skeleton
from computron.models.checkpoint import Source, checkpoint_tensors, choose_dtype, open_source
from computron.models.geometry import CacheGeometry, cache_geometry
from computron.models.images import CheckpointImage, StateImage, tensors_equal
from computron.models.layout import Layout, TensorSlot, lay_out, model_stages, persistent_tensors
from computron.models.random_image import RandomImage
from computron.models.safetensors_file import FileTensor
from computron.models.text import GenerationDefaults, generation_defaults, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """What a model is, and how its image is laid out: one segment for each stage.

    `aliases`: tied tensor -> the one that holds the bytes. `outside`: tensors that no checkpoint holds; they are
    computed on loading and are not part of the image. `max_model_len`: tokens that fit, 0 if not a text model.
    """

    config: ModelConfig
    architecture: str
    dtype: torch.dtype
    image: ImageSource
    layout: Layout
    outside: frozenset[str] = frozenset()
    source: Source | None = None
    cache: CacheGeometry | None = None
    max_model_len: int = 0
    vocabulary: int = 0
    labels: tuple[str, ...] = ()
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def task(self) -> Task:
        return self.config.task

    @property
    def tensors(self) -> tuple[TensorSlot, ...]:
        return self.layout.slots

    @property
    def stages(self) -> tuple[str, ...]:
        return self.layout.stages

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.layout.aliases

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CheckpointError if the checkpoint has none."""
        if self.source is None:
            raise CheckpointError(f'model "{self.config.id}" has no tokenizer: it is a custom model')
        return load_tokenizer(self.config, self.source.folder, self.source.config)


def plan_model(config: ModelConfig) -> ModelPlan:
    """Read configs and headers, no weights. Raises CheckpointError or ConfigError with the remedy."""
    source = open_source(config)
    tensors = {} if source.random or source.folder is None else checkpoint_tensors(source.folder)
    dtype = choose_dtype(config, source.config, tensors)
    module = skeleton.build(config, source.config, dtype, None)
    cache = cache_geometry(config, source.config, dtype) if config.task == "generate" else None
    layout, image, outside = _plan_image(config, source, module, dtype, tensors)
    text = source.config.get_text_config()
    return ModelPlan(
        config=config,
        architecture=type(module).__name__,
        dtype=dtype,
        image=image,
        layout=layout,
        outside=outside,
        source=source,
        cache=cache,
        max_model_len=_max_model_len(config, source.config),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        generation=generation_defaults(source.folder, source.config),
    )


def _plan_image(
    config: ModelConfig,
    source: Source,
    module: PreTrainedModel,
    dtype: torch.dtype,
    tensors: Mapping[str, FileTensor],
) -> tuple[Layout, ImageSource, frozenset[str]]:
    dtypes = skeleton.target_dtypes(module, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in persistent_tensors(module)}
    if source.random or source.folder is None:
        aliases = skeleton.resolve_ties(module, dtypes, lambda a, b: True)
        layout = _layout(module, dtypes, shapes, aliases, frozenset())
        deviation = getattr(source.config.get_text_config(), "initializer_range", None) or 0.02
        return layout, RandomImage(layout, seed=config.seed, deviation=deviation), frozenset()
    names = skeleton.map_names(module, tensors)
    if names is None:
        logger.info("%s: loaded by transformers, since its tensors are converted on the way", config.id)
        aliases = skeleton.resolve_ties(module, {}, lambda a, b: True)
        layout = _layout(module, dtypes, shapes, aliases, frozenset())
        load = functools.partial(skeleton.load_state, config, source.folder, dtype)
        return layout, StateImage(layout, load), frozenset()
    held = {new: tensors[old] for old, new in names.items()}
    aliases = skeleton.resolve_ties(module, held, lambda a, b: tensors_equal(held[a], held[b]))
    outside = _check(source.folder, module, held, shapes, aliases)
    layout = _layout(module, dtypes, shapes, aliases, outside)
    return layout, CheckpointImage(layout, {slot.name: held[slot.name] for slot in layout.slots}), outside


def _layout(
    module: PreTrainedModel,
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    outside: frozenset[str],
) -> Layout:
    names = [name for name in dtypes if name not in aliases and name not in outside]
    embeddings = _embedding_names(module)
    first = {aliases.get(name, name) for name in embeddings}
    return lay_out(model_stages(module, names, first), {name: (dtypes[name], shapes[name]) for name in names}, aliases)


def _embedding_names(module: PreTrainedModel) -> list[str]:
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return []
    owned = {id(parameter) for parameter in embedding.parameters()} if isinstance(embedding, nn.Module) else set()
    return [name for name, tensor in persistent_tensors(module) if id(tensor) in owned]


def _check(
    folder: Path,
    module: PreTrainedModel,
    held: Mapping[str, FileTensor],
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
) -> frozenset[str]:
    """Names to compute on loading, because the checkpoint may lack them. Raises CheckpointError for any other fault."""
    architecture = type(module).__name__
    for name, tensor in held.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, {architecture} needs "
                f"{list(shapes[name])}; the weights and config.json do not belong together"
            )
    missing = [name for name in shapes if name not in held and aliases.get(name, name) not in held]
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    outside = frozenset(name for name in missing if name in buffers or _may_lack(module, name))
    lacking = [name for name in missing if name not in outside]
    if lacking:
        rest = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{folder}: tensor {lacking[0]}{rest} of {architecture} is missing; "
            "fetch the checkpoint again, or choose the task that it was trained for"
        )
    return outside


def _may_lack(module: PreTrainedModel, name: str) -> bool:
    import re

    return any(re.search(pattern, name) for pattern in module._keys_to_ignore_on_load_missing or ())


def _max_model_len(model: ModelConfig, config: PretrainedConfig) -> int:
    text = config.get_text_config()
    known = next(
        (
            int(value)
            for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
            if (value := getattr(text, key, None))
        ),
        0,
    )
    if model.max_model_len is not None:
        if known and model.max_model_len > known:
            raise CheckpointError(
                f'model "{model.id}": max_model_len = {model.max_model_len} exceeds the {known} positions of its '
                "checkpoint; lower it"
            )
        return model.max_model_len
    return known
