"""What a generate model keeps of each token: found by running its forward on the meta device, once, without weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from computron.config import ModelConfig
from computron.errors import CheckpointError
from computron.models import skeleton

PROBE = "computron_probe"
_calls = threading.local()  # .seen: what the attention layers of this thread's forward were given


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """Keys and values of one token: `layers` times `key_value_heads` times (`key_dim` + `value_dim`) of `dtype`.

    Layers with a sliding window keep the whole context, as the others do. `longest`: tokens up to which attention to
    the whole context is what the model does, because a window or chunk of its layers is known to no one but its mask;
    None: any number.
    """

    layers: int
    key_value_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    longest: int | None = None

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.key_value_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def cache_geometry(
    model: ModelConfig,
    config: PretrainedConfig,
    dtype: torch.dtype,
    prepare: Callable[[PreTrainedModel], None] = lambda module: None,
) -> CacheGeometry:
    """Geometry of the module that a checkpoint's config describes, when it runs in `dtype`. `prepare` may change it.

    Raises CheckpointError if the model keeps anything else than keys and values of its attention layers, or if its
    attention does not go through transformers' attention interface.
    """
    module = build_probed(model, config)
    refusal = f'model "{model.id}": {type(module).__name__} cannot be served for generate: '
    if getattr(module.config, "is_encoder_decoder", False):
        raise CheckpointError(refusal + "it is an encoder-decoder; decoder-only models are served")
    if getattr(module, "_is_stateful", False):
        raise CheckpointError(refusal + "it keeps a recurrent state, which a paged cache cannot hold")
    layers = getattr(module.config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        raise CheckpointError(refusal + "its config does not say how many layers it has")
    prepare(module)
    try:
        meta_forward(module, model)
    except Exception as error:
        raise CheckpointError(refusal + f"its forward does not take packed sequences ({error!r})") from error
    calls = _calls.seen
    if len(calls) != layers or {call[0] for call in calls} != set(range(layers)):
        raise CheckpointError(
            refusal + f"{len(calls)} of its {layers} layers use transformers' attention interface, all of them must"
        )
    shapes = {call[1:3] for call in calls}
    if len(shapes) != 1:
        raise CheckpointError(
            refusal + f"its layers have keys and values of different shapes: {sorted(map(str, shapes))}"
        )
    _, key, value, _ = calls[0]
    longest = _longest(module.config.get_text_config(), {call[0]: call[3] for call in calls})
    return CacheGeometry(layers, key[1], key[3], value[3], dtype, longest)


def build_probed(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """A module for `meta_forward`. Some kernels (grouped matrices of experts) know only one dtype without values."""
    return skeleton.build(model, config, torch.bfloat16, PROBE)


def meta_forward(module: PreTrainedModel, model: ModelConfig) -> torch.Tensor:
    """The logits or last hidden states, all without values. `module`: on the meta device, with `PROBE` attention."""
    _calls.seen = []
    config: Any = module.config
    given: dict[str, Any]
    if model.task == "classify" and skeleton.is_image_model(config):
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, getattr(config, "num_channels", 3), height, width)
        given = {"pixel_values": torch.zeros(shape, dtype=module.dtype, device="meta")}
    else:
        ids = torch.zeros((1, 4), dtype=torch.int64, device="meta")
        # The mask is dropped before the layers; without one, some models look for padding in the values of `ids`.
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.task == "generate":
            given |= {"position_ids": ids, "use_cache": False}
    with torch.inference_mode():
        output = module(**given)
    result: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return result


def _longest(config: Any, windows: Mapping[int, int | None]) -> int | None:
    """The least window or chunk that the config names and the layer's attention was not given. `windows`: by layer."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        given = any(windows.values())
        hidden = {chunk, None if given else window}
    else:
        local = {"sliding_attention": window, "chunked_attention": chunk}
        hidden = {local.get(kind) for layer, kind in enumerate(kinds) if not windows.get(layer)}
    return min((size for size in hidden if size), default=None)


def _record(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    window = kwargs.get("sliding_window")
    _calls.seen.append((int(getattr(module, "layer_idx", -1)), tuple(key.shape), tuple(value.shape), window))
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3])), None


AttentionInterface.register(PROBE, _record)
