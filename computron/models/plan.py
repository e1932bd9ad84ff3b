"""From a model's configuration to everything that is known of it before a byte of its weights is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from computron.config import ModelConfig, Task
from computron.errors import CheckpointError, ConfigError
from computron.memory.images import ImageSource
from computron.models import skeleton
from computron.models.checkpoint import Source, checkpoint_tensors, choose_dtype, naming, open_source
from computron.models.custom import make_module
from computron.models.embedding import EmbeddingSettings, embedding_settings
from computron.models.fingerprint import checkpoint_fingerprint, custom_fingerprint
from computron.models.geometry import CacheGeometry, cache_geometry
from computron.models.images import StateImage
from computron.models.layout import Layout, TensorSlot, lay_out, module_stages, persistent_tensors
from computron.models.pretrained import plan_image
from computron.models.shard import WHOLE, Shard
from computron.models.split import Split, plan_split, split_cache, split_image
from computron.models.text import GenerationDefaults, generation_defaults, load_tokenizer
from computron.models.vision import ImageProcessor, load_image_processor

# Builds the module for a device, with an attention implementation (None: transformers' choice). Its tensors of the
# image are about to be replaced; those outside the image are already on the device.
Builder = Callable[[torch.device, str | None], nn.Module]


@dataclass(frozen=True)
class ModelPlan:
    """What a model is, and how its image is laid out: one segment for each stage.

    `max_model_len`: tokens that fit, 0 if it is not a text model. `labels`: of classes, in the order of the logits;
    `activation` makes probabilities of these. `split`: how a part of a transformers model runs. `identify` makes
    the fingerprint.
    """

    config: ModelConfig
    identify: Callable[[], str]
    architecture: str
    dtype: torch.dtype
    image: ImageSource
    layout: Layout
    build: Builder
    shard: Shard = WHOLE
    split: Split | None = None
    source: Source | None = None
    cache: CacheGeometry | None = None
    max_model_len: int = 0
    vocabulary: int = 0
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    embedding: EmbeddingSettings | None = None
    labels: tuple[str, ...] = ()
    activation: Literal["softmax", "sigmoid"] = "softmax"
    takes_images: bool = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex, the same for all parts, and another one for another source (`models.fingerprint` says what it sees).

        Made when it is first asked for, which reads a little of every tensor. Raises CheckpointError.
        """
        return self.identify()

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
        """Tied tensor -> the one that holds the bytes."""
        return self.layout.aliases

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CheckpointError if the model has none."""
        if self.source is None or self.takes_images:
            raise CheckpointError(f'model "{self.config.id}" takes no text')
        return load_tokenizer(self.config, self.source.folder, self.source.config)

    @functools.cached_property
    def image_processor(self) -> ImageProcessor:
        """Raises CheckpointError if the model has none."""
        if self.source is None or not self.takes_images:
            raise CheckpointError(f'model "{self.config.id}" takes no images')
        return load_image_processor(self.config, self.source.folder)


def plan_model(config: ModelConfig, shard: Shard = WHOLE) -> ModelPlan:
    """Read configs and headers, no weights; a custom model's factory is called, and its weights held until they have
    been read and the module is loaded. Raises CheckpointError or ConfigError, naming the model, with the remedy.

    `shard`: image, layout and cache geometry are those of this part of the model; the rest is the whole model's.
    """
    with naming(config.id):
        return _plan_custom(config, shard) if config.task == "custom" else _plan_pretrained(config, shard)


def _plan_pretrained(config: ModelConfig, shard: Shard) -> ModelPlan:
    source = open_source(config)
    tensors = {} if source.random or source.folder is None else checkpoint_tensors(source.folder)
    dtype = choose_dtype(config, source.config, tensors)
    cache = cache_geometry(config, source.config, dtype) if config.task == "generate" and shard.whole else None
    module = skeleton.build(config, source.config, dtype, None)
    if config.task == "embed" and getattr(source.config, "is_encoder_decoder", False):
        raise CheckpointError(
            f'model "{config.id}": {type(module).__name__} is an encoder-decoder, which is not served for embed'
        )
    layout, image, outside = plan_image(config, source, module, dtype, tensors)
    split = None if shard.whole else plan_split(config, source.config, layout, shard)

    def build(device: torch.device, attention: str | None) -> nn.Module:
        built = skeleton.build(config, source.config, dtype, attention)
        skeleton.fill_outside(built, outside, device)
        if split is not None:
            split.resize(built)
        return built

    classify = config.task == "classify"
    embedding = embedding_settings(config, source.folder, module) if config.task == "embed" else None
    takes_images = classify and skeleton.is_image_model(source.config)
    max_model_len = 0 if takes_images else _max_model_len(config, source.config, module, embedding)
    if cache is not None and cache.longest is not None and max_model_len > cache.longest:
        raise CheckpointError(
            f'model "{config.id}": {type(module).__name__} applies the sliding window or chunks of {cache.longest} '
            f"tokens of its attention by a mask, which is not served; set max_model_len to {cache.longest} or less, "
            "where they make no difference"
        )
    if split is not None:
        layout, image = split_image(split, module, layout, image)
        if config.task == "generate":
            cache = split_cache(split, cache_geometry(config, source.config, dtype, split.prepare))
    generation = generation_defaults(source.folder, source.config)
    plan = ModelPlan(
        config=config,
        identify=functools.partial(checkpoint_fingerprint, config, source, tensors, generation, embedding),
        architecture=type(module).__name__,
        dtype=dtype,
        image=image,
        layout=layout,
        build=build,
        shard=shard,
        split=split,
        source=source,
        cache=cache,
        max_model_len=max_model_len,
        vocabulary=int(getattr(source.config.get_text_config(), "vocab_size", 0) or 0),
        generation=generation,
        embedding=embedding,
        labels=_labels(source.config) if classify else (),
        activation=_activation(source.config),
        takes_images=takes_images,
    )
    _ = plan.image_processor if takes_images else plan.tokenizer  # what is wrong with it is better said now
    return plan


def _plan_custom(config: ModelConfig, shard: Shard) -> ModelPlan:
    first = make_module(config, shard)
    spare = [first]  # the module just made serves the first load; a later one makes another

    def build(device: torch.device, attention: str | None) -> nn.Module:
        module = spare.pop() if spare else make_module(config, shard)
        for owner in module.modules():
            for name in owner._non_persistent_buffers_set:
                if (buffer := owner._buffers[name]) is not None:
                    setattr(owner, name, buffer.to(device))
        return module

    held = dict(persistent_tensors(first))
    names: dict[int, str] = {}
    aliases = {name: kept for name, tensor in held.items() if (kept := names.setdefault(id(tensor), name)) != name}
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items() if name not in aliases}
    layout = lay_out(module_stages(first, described), described, aliases)
    floats = (tensor.dtype for tensor in held.values() if tensor.dtype.is_floating_point)
    fingerprint = custom_fingerprint(config)  # at once: a batch manager that is not there is better said now
    return ModelPlan(
        config=config,
        identify=lambda: fingerprint,
        architecture=type(first).__name__,
        dtype=next(floats, torch.float32),
        image=StateImage(layout, lambda: dict(persistent_tensors(make_module(config, shard))), held),
        layout=layout,
        build=build,
        shard=shard,
    )


def _max_model_len(
    model: ModelConfig, config: PretrainedConfig, module: PreTrainedModel, embedding: EmbeddingSettings | None
) -> int:
    text = config.get_text_config()
    known = next(
        (int(n) for key in ("max_position_embeddings", "n_positions", "max_seq_len") if (n := getattr(text, key, 0))), 0
    )
    for name, part in module.named_modules():
        # RoBERTa and its kin count positions from the padding token's on.
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            known = part.num_embeddings - part.padding_idx - 1
    if embedding is not None and embedding.max_length is not None:
        known = min(known, embedding.max_length) if known else embedding.max_length
    if model.max_model_len is None:
        if not known and model.task == "generate":
            raise ConfigError(f'model "{model.id}": its checkpoint names no longest context; set max_model_len')
        return known
    if known and model.max_model_len > known:
        raise ConfigError(
            f'model "{model.id}": max_model_len = {model.max_model_len} is more than the {known} tokens that its '
            f"checkpoint is made for; set it to {known} or less"
        )
    return model.max_model_len


def _labels(config: PretrainedConfig) -> tuple[str, ...]:
    names: Mapping[Any, str] = config.id2label or {}
    return tuple(names.get(index, f"LABEL_{index}") for index in range(config.num_labels or 0))


def _activation(config: PretrainedConfig) -> Literal["softmax", "sigmoid"]:
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    return "sigmoid" if several or config.num_labels == 1 else "softmax"
