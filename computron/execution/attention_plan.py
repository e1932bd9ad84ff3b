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
from computron.execution.steps import TokenBatch

# Blocks of padding at which a group of its own is cheaper than a wider one: gathering and attending to a block of a
# small model takes about 1 us, the calls of one more group about 60 us a layer.
MAX_PADDING_BLOCKS = 64


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


def packing_key(start: int, length: int) -> tuple[bool, int]:
    """Sorts new tokens of sequences into the order of a `TokenBatch`: single ones first, of the longest sequence first.

    `start`: tokens that the sequence has in the cache already, `length`: the new ones.
    """
    return length > 1, -blocks_for(start + length)


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
        self, cache: KVCache, batch: TokenBatch, windows: set[int | None], extras: Sequence[Indices] = ()
    ) -> None:
        """`windows`: those that the layers are known to ask for; new ones are added."""
        self.cache = cache
        self._starts, self._lengths, self._blocks = batch.starts, batch.lengths, batch.blocks
        self._windows = windows
        self._counts = -(-(self._starts + self._lengths) // BLOCK_TOKENS)  # blocks of each sequence
        self._offsets = self._counts.cumsum() - self._counts  # of its first one in `batch.blocks`
        positions, offsets = self._starts, self._offsets
        if len(positions) != len(batch.tokens):
            places = self._lengths.cumsum() - self._lengths  # of each sequence's first token in the packed row
            positions = np.arange(len(batch.tokens)) + np.repeat(positions - places, self._lengths)
            offsets = np.repeat(offsets, self._lengths)
        blocks = self._blocks[offsets + positions // BLOCK_TOKENS]
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
        singles = int(np.count_nonzero(self._lengths == 1))
        groups = _groups(self._counts[:singles].tolist(), window)
        drafts = [self._decode_draft(begin, end, window) for begin, end in groups]
        begin = singles
        for sequence in range(singles, len(self._lengths)):
            end = begin + int(self._lengths[sequence])
            drafts.append(self._prompt_draft(sequence, begin, end, window))
            begin = end
        return drafts

    def _decode_draft(self, begin: int, end: int, window: int | None) -> _Draft:
        starts = self._starts[begin:end]
        firsts = _first_blocks(starts, window)
        seen = self._counts[begin:end] - firsts
        places = np.arange(seen.max())
        # Padding: any block that is mapped and written, such as the first one that the sequence sees.
        shown = np.where(places < seen[:, None], places, 0)
        table = self._blocks[(self._offsets[begin:end] + firsts)[:, None] + shown]
        return _Draft(begin, end, starts - firsts * BLOCK_TOKENS, table.shape[1] * BLOCK_TOKENS, self.cache.rows(table))

    def _prompt_draft(self, sequence: int, begin: int, end: int, window: int | None) -> _Draft:
        starts = self._starts[sequence : sequence + 1]
        if starts[0] == 0:
            return _Draft(begin, end, starts, end - begin, None)
        firsts = _first_blocks(starts, window)
        offset, first, count = (int(each[0]) for each in (self._offsets[sequence:], firsts, self._counts[sequence:]))
        blocks = self._blocks[offset + first : offset + count]
        rows = self.cache.rows(blocks[None])
        return _Draft(begin, end, starts - firsts * BLOCK_TOKENS, len(blocks) * BLOCK_TOKENS, rows)


def _arrays(drafts: Sequence[_Draft]) -> list[Indices]:
    """What has to be on the device for them, in the order in which it is taken."""
    return [array for draft in drafts for array in (draft.starts, draft.rows) if array is not None]


def _first_blocks(starts: Indices, window: int | None) -> Indices:
    """The first block that any new token of each sequence sees."""
    return np.zeros_like(starts) if window is None else np.maximum(0, starts - window + 1) // BLOCK_TOKENS


def _groups(blocks: Sequence[int], window: int | None) -> list[tuple[int, int]]:
    """Neighbours (the longest comes first) as long as padding them to one width is cheaper than one more call.

    `blocks`: of each sequence. Gives [begin, end) of each group.
    """
    groups, begin, padding = [], 0, 0
    most = None if window is None else blocks_for(window) + 1
    widths = blocks if most is None else [min(count, most) for count in blocks]
    for index, width in enumerate(widths):
        padding += widths[begin] - width
        if padding > MAX_PADDING_BLOCKS:
            groups.append((begin, index))
            begin, padding = index, 0
    if widths:
        groups.append((begin, len(widths)))
    return groups
