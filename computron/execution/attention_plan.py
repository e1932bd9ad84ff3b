"""Where the tokens of one step stand: their cache slots, and which keys each of them sees.

The tokens of a step are packed without padding. First come single tokens (decoding sequences), in groups of similar
length that are computed together; then the longer chunks of prompts, each by itself. Everything is worked out once a
step and shared by all layers, so that a layer does no more than one write, one gather and one attention a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from computron.execution.blocks import BLOCK_TOKENS, blocks_for
from computron.execution.kv_cache import Indices, KVCache, upload

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


@dataclass(frozen=True, slots=True)
class _Draft:
    """A part whose indices are still on the host. `starts`: the place, among its keys, of each sequence's first query.

    `rows` None: the chunk is the whole sequence so far. `width`: keys, padding included.
    """

    begin: int
    end: int
    starts: Indices
    width: int
    rows: Indices | None

    def part(self, window: int | None, dtype: torch.dtype, rows: torch.Tensor | None, starts: torch.Tensor) -> Part:
        """`rows` and `starts`: on the device. The mask is made there, as it may be large."""
        batch, queries = len(self.starts), (self.end - self.begin) // len(self.starts)
        if rows is None and (window is None or queries <= window):
            return Part(self.begin, self.end, batch, None, None)
        device = starts.device
        places = starts[:, None] + torch.arange(queries, device=device)
        distance = torch.arange(self.width, device=device) - places[:, :, None]
        hidden = distance > 0
        if window is not None:
            hidden |= distance <= -window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return Part(self.begin, self.end, batch, rows, mask[:, None])


class AttentionPlan:
    """`positions`: [tokens], of each token in its sequence. `extras`: the given ones, on the device."""

    def __init__(
        self, cache: KVCache, chunks: Sequence[Chunk], windows: set[int | None], extras: Sequence[Indices] = ()
    ) -> None:
        """`chunks` in `packing_order`. `windows`: those that the layers are known to ask for; new ones are added."""
        self.cache = cache
        self._chunks = chunks
        self._windows = windows
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        blocks = np.concatenate([_block_of_each_token(chunk) for chunk in chunks])
        slots = cache.slots(blocks, positions % BLOCK_TOKENS)
        drafts = {window: self._drafts(window) for window in windows}
        arrays = [array for each in drafts.values() for array in _arrays(each)]
        uploaded = iter(upload([positions, *slots, *extras, *arrays], cache.device))
        self.positions = next(uploaded)
        self.slots = next(uploaded), next(uploaded)
        self.extras = [next(uploaded) for _ in extras]
        self._parts = {window: self._finished(window, each, uploaded) for window, each in drafts.items()}

    def parts(self, window: int | None) -> list[Part]:
        """The calls of attention of a layer that sees the last `window` tokens, its own included; None: all."""
        parts = self._parts.get(window)
        if parts is None:
            self._windows.add(window)
            drafts = self._drafts(window)
            uploaded = iter(upload(_arrays(drafts), self.cache.device))
            parts = self._parts[window] = self._finished(window, drafts, uploaded)
        return parts

    def _finished(self, window: int | None, drafts: list[_Draft], uploaded: Iterator[torch.Tensor]) -> list[Part]:
        return [
            draft.part(
                window,
                self.cache.dtype,
                starts=next(uploaded),
                rows=next(uploaded) if draft.rows is not None else None,
            )
            for draft in drafts
        ]

    def _drafts(self, window: int | None) -> list[_Draft]:
        singles = sum(chunk.length == 1 for chunk in self._chunks)
        drafts, begin = [], 0
        for group in _groups(self._chunks[:singles], window):
            drafts.append(self._decode_draft(group, begin, window))
            begin += len(group)
        for chunk in self._chunks[singles:]:
            drafts.append(self._prompt_draft(chunk, begin, window))
            begin += chunk.length
        return drafts

    def _decode_draft(self, group: Sequence[Chunk], begin: int, window: int | None) -> _Draft:
        firsts = [_first_block(chunk, window) for chunk in group]
        width = max(len(chunk.blocks) - first for chunk, first in zip(group, firsts, strict=True))
        table = np.empty((len(group), width), np.int64)
        for row, chunk, first in zip(table, group, firsts, strict=True):
            seen = chunk.blocks[first:]
            row[: len(seen)] = seen
            row[len(seen) :] = seen[0]  # padding: any block that is mapped and written
        starts = np.array([chunk.start - first * BLOCK_TOKENS for chunk, first in zip(group, firsts, strict=True)])
        return _Draft(begin, begin + len(group), starts, width * BLOCK_TOKENS, self.cache.rows(table))

    def _prompt_draft(self, chunk: Chunk, begin: int, window: int | None) -> _Draft:
        end = begin + chunk.length
        if chunk.start == 0:
            return _Draft(begin, end, np.zeros(1, np.int64), chunk.length, None)
        first = _first_block(chunk, window)
        blocks = chunk.blocks[first:]
        starts = np.array([chunk.start - first * BLOCK_TOKENS])
        return _Draft(begin, end, starts, len(blocks) * BLOCK_TOKENS, self.cache.rows(blocks[None]))


def _arrays(drafts: Sequence[_Draft]) -> list[Indices]:
    """What has to be on the device for them, in the order in which it is taken."""
    return [array for draft in drafts for array in (draft.starts, draft.rows) if array is not None]


def _block_of_each_token(chunk: Chunk) -> Indices:
    return chunk.blocks[np.arange(chunk.start, chunk.end) // BLOCK_TOKENS]


def _first_block(chunk: Chunk, window: int | None) -> int:
    """The first block that any token of the chunk sees."""
    return 0 if window is None else max(0, chunk.start - window + 1) // BLOCK_TOKENS


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
