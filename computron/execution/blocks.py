"""Which blocks of a KV cache are taken. Lowest free block first, so that a shrinking cache seldom has to move any."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockAllocator:
    """Hands out the block numbers [0, limit). The limit starts at 0 and follows the frames that are mapped."""

    def __init__(self) -> None:
        self._limit = 0
        self._free: list[int] = []  # a heap; every entry is below the limit
        self._used: set[int] = set()

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> frozenset[int]:
        return frozenset(self._used)

    def take(self, count: int) -> list[int] | None:
        """The `count` lowest free blocks, ascending; None, and nothing is taken, if there are fewer."""
        if count > len(self._free):
            return None
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Blocks that are no longer needed. Raises KeyError if one was not taken."""
        for block in blocks:
            self._used.remove(block)
            heapq.heappush(self._free, block)

    def set_limit(self, limit: int) -> dict[int, int]:
        """Change the limit; gives old -> new number of each block that has to move below it.

        Raises ValueError, and changes nothing, if the blocks in use do not fit below the new limit.
        """
        if len(self._used) > limit:
            raise ValueError(f"{len(self._used)} blocks of the KV cache are in use, only {limit} would be left")
        stranded = sorted(block for block in self._used if block >= limit)
        if limit < self._limit:
            self._free = [block for block in self._free if block < limit]
        else:
            self._free.extend(range(self._limit, limit))
        heapq.heapify(self._free)
        self._limit = limit
        self._used.difference_update(stranded)
        targets = self.take(len(stranded))
        assert targets is not None, "the room was counted above"
        return dict(zip(stranded, targets, strict=True))
