"""Positions that every sequence of a batch can use without changing those of another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

# transformers chooses the frequencies of these by the longest sequence in the batch, for all of them, and keys that
# are in the cache already stay as they are. Up to the original length the frequencies are always the same.
SWITCHING = ("dynamic", "longrope")


def position_limit(config: PretrainedConfig) -> int | None:
    """The length up to which rotary positions do not depend on the batch; None if they never do."""
    text: Any = config.get_text_config()
    limits = [
        int(rope.get("original_max_position_embeddings") or _original(text))
        for rope in _ropes(getattr(text, "rope_parameters", None) or {})
        if rope.get("rope_type") in SWITCHING
    ]
    return min(limits, default=None)


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One set of rotary parameters, or one for each kind of layer."""
    yield parameters
    yield from (value for value in parameters.values() if isinstance(value, Mapping))


def _original(config: Any) -> int:
    return int(getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)
