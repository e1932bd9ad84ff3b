"""Where the tokens of one step stand: their cache slots, and which keys each of them sees.

The tokens of a step are packed without padding. First come single tokens (decoding sequences), in groups of similar
length that are computed together; then the longer chunks of prompts, each by itself. Everything is worked out once a
step and shared by all layers, so that a layer does no more than one write, one gather and one attention a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from computron.execution.blocks import BLOCK_TOKENS, blocks_for
from computron.execution.kv_cache import Indices, KVCache

# Blocks of padding at which a group of its own is cheaper than a wider one: gathering and attending to a block of a
# small model takes about 1 us, the calls of one more group about 60 us a layer.
MAX_PADDING_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` new tokens of a sequence that has `start` tokens in its `blocks`; the blocks hold the new ones too."""

    blocks: Indices
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Part:
    """One call of attention: the packed tokens [begin, end) as `batch` sequences of equal length.

    `rows`: cache rows to gather for it (None: the chunk is the whole sequence so far, nothing is read back).
    `mask`: added to the scores, broadcast to [batch, heads, queries, keys]; None with `rows` None: causal.
    """

    begin: int
    end: int
    batch: int
    rows: torch.Tensor | None
    mask: torch.Tensor | None


def packing_order(chunks: Sequence[Chunk]) -> list[int]:
    """The order in which `AttentionPlan` takes chunks: single tokens first, the longest sequence first."""
    return sorted(range(len(chunks)), key=lambda i: (chunks[i].length > 1, -len(chunks[i].blocks)))


class AttentionPlan:
    """`chunks` in `packing_order`. `positions`: [tokens], of each token in its sequence."""

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk]) -> None:
        self.cache = cache
        self._chunks = chunks
        self._parts: dict[int | None, list[Part]] = {}
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        blocks = np.concatenate([_block_of_each_token(chunk) for chunk in chunks])
        self.positions = cache.upload(positions)
        self.slots = cache.slots(blocks, positions % BLOCK_TOKENS)

    def parts(self, window: int | None) -> list[Part]:
        """The calls of attention of a layer that sees the last `window` tokens, its own included; None: all."""
        parts = self._parts.get(window)
        if parts is None:
            parts = self._parts[window] = self._make_parts(window)
        return parts

    def _make_parts(self, window: int | None) -> list[Part]:
        singles = sum(chunk.length == 1 for chunk in self._chunks)
        parts, begin = [], 0
        for group in _groups(self._chunks[:singles], window):
            parts.append(self._decode_part(group, begin, window))
            begin += len(group)
        for chunk in self._chunks[singles:]:
            parts.append(self._prompt_part(chunk, begin, window))
            begin += chunk.length
        return parts

    def _decode_part(self, group: Sequence[Chunk], begin: int, window: int | None) -> Part:
        firsts = [_first_block(chunk, window) for chunk in group]
        width = max(len(chunk.blocks) - first for chunk, first in zip(group, firsts, strict=True))
        table = np.empty((len(group), width), np.int64)
        for row, chunk, first in zip(table, group, firsts, strict=True):
            seen = chunk.blocks[first:]
            row[: len(seen)] = seen
            row[len(seen) :] = seen[0]  # padding: any block that is mapped and written
        # Positions of the keys against that of the query; what is not in (-window, 0] is hidden.
        starts = np.array([chunk.start - first * BLOCK_TOKENS for chunk, first in zip(group, firsts, strict=True)])
        distance = np.arange(width * BLOCK_TOKENS) - starts[:, None]
        hidden = _hidden(distance, window)
        mask = self._mask(hidden)[:, None, None, :]
        return Part(begin, begin + len(group), len(group), self.cache.rows(table), mask)

    def _prompt_part(self, chunk: Chunk, begin: int, window: int | None) -> Part:
        end = begin + chunk.length
        if chunk.start == 0:
            if window is None or chunk.length <= window:
                return Part(begin, end, 1, None, None)
            return Part(begin, end, 1, None, self._causal_mask(chunk.length, chunk.length, 0, window))
        first = _first_block(chunk, window)
        blocks = chunk.blocks[first:]
        mask = self._causal_mask(chunk.length, len(blocks) * BLOCK_TOKENS, chunk.start - first * BLOCK_TOKENS, window)
        return Part(begin, end, 1, self.cache.rows(blocks[None]), mask)

    def _causal_mask(self, queries: int, keys: int, offset: int, window: int | None) -> torch.Tensor:
        """[queries, keys]; the first query stands at key `offset`. Made on the device: it may be large."""
        device = self.cache.device
        distance = torch.arange(keys, device=device) - torch.arange(offset, offset + queries, device=device)[:, None]
        hidden = distance > 0
        if window is not None:
            hidden |= distance <= -window
        return torch.zeros((queries, keys), dtype=self.cache.dtype, device=device).masked_fill_(hidden, -torch.inf)

    def _mask(self, hidden: npt.NDArray[np.bool_]) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
        return mask.to(self.cache.device, non_blocking=True)


def _block_of_each_token(chunk: Chunk) -> Indices:
    return chunk.blocks[np.arange(chunk.start, chunk.end) // BLOCK_TOKENS]


def _first_block(chunk: Chunk, window: int | None) -> int:
    """The first block that any token of the chunk sees."""
    return 0 if window is None else max(0, chunk.start - window + 1) // BLOCK_TOKENS


def _hidden(distance: npt.NDArray[np.int64], window: int | None) -> npt.NDArray[np.bool_]:
    return distance > 0 if window is None else (distance > 0) | (distance <= -window)


def _groups(singles: Sequence[Chunk], window: int | None) -> list[Sequence[Chunk]]:
    """Neighbours (the longest comes first) as long as padding them to one width is cheaper than one more call."""
    groups, begin, padding = [], 0, 0
    most = None if window is None else blocks_for(window) + 1
    widths = [len(chunk.blocks) if most is None else min(len(chunk.blocks), most) for chunk in singles]
    for index, width in enumerate(widths):
        padding += widths[begin] - width
        if padding > MAX_PADDING_BLOCKS:
            groups.append(singles[begin:index])
            begin, padding = index, 0
    if singles:
        groups.append(singles[begin:])
    return groups
