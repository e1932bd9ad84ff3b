"""The host store's memory: one region cut into slots of page size, committed as they are first used."""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Iterable, Sequence
from typing import Final

from computron import _transfer
from computron.errors import OutOfMemory

SLAB: Final = 64 << 20  # memory is committed, and pinned for a GPU, this much at a time

_libc = ctypes.CDLL(None)  # calls through CDLL release the GIL
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same_bytes(left: int, right: int, nbytes: int) -> bool:
    """Whether two addresses hold the same bytes. Releases the GIL."""
    return bool(_libc.memcmp(left, right, nbytes) == 0)


def same_blocks(blocks: Iterable[tuple[int, bytes]], address: int) -> bool:
    """Whether (offset, bytes) pairs equal what stands at `address`."""
    return all(_libc.memcmp(block, address + offset, len(block)) == 0 for offset, block in blocks)


class Arena:
    """`take` and `give` want the caller's lock; the other methods work on a slot that the caller owns."""

    def __init__(self, backend: _transfer.Backend, slots: int, page_bytes: int, touch_threads: int) -> None:
        self.slots = slots
        self.page_bytes = page_bytes
        self._touch_threads = touch_threads
        slab_bytes = max(1, SLAB // page_bytes) * page_bytes  # no page crosses a slab
        self._memory = _transfer.HostMemory(backend, slots * page_bytes, slab_bytes=slab_bytes)
        self._free: list[int] = []
        self._fresh = 0  # slots from here on were never taken
        self._committed = bytearray(slots)

    @property
    def used(self) -> int:
        return self._fresh - len(self._free)

    @property
    def committed_bytes(self) -> int:
        return self._memory.committed

    def take(self) -> int | None:
        """The lowest free slot, not yet committed if it is new; None if all are taken."""
        if self._free:
            return heapq.heappop(self._free)
        if self._fresh == self.slots:
            return None
        self._fresh += 1
        return self._fresh - 1

    def take_committed(self) -> int | None:
        """A free slot that is ready to be written to at once, if there is one."""
        if self._free and self._committed[self._free[0]]:
            return heapq.heappop(self._free)
        return None

    def give(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def commit(self, slot: int) -> None:
        """Back the slot by memory. Raises OutOfMemory if the system has none."""
        try:
            self._memory.commit(slot * self.page_bytes, self.page_bytes, self._touch_threads)
        except _transfer.DeviceFailed:
            raise
        except _transfer.TransferError as error:
            raise OutOfMemory(
                f"the host has no memory left for the store after {self._memory.committed >> 20} MiB of a budget of "
                f"{self._memory.nbytes >> 20} MiB ({error}): lower host.memory"
            ) from error
        self._committed[slot] = 1

    def discard(self, slots: Sequence[int]) -> None:
        """Give the memory of these slots back to the system; they stay taken."""
        ordered = sorted(slots)
        start = 0
        for position in range(1, len(ordered) + 1):
            if position == len(ordered) or ordered[position] != ordered[position - 1] + 1:
                first, last = ordered[start], ordered[position - 1]
                self._memory.discard(first * self.page_bytes, (last - first + 1) * self.page_bytes)
                start = position

    def address(self, slot: int) -> int:
        return self._memory.address + slot * self.page_bytes

    def buffer(self, slot: int, nbytes: int) -> memoryview:
        return self._memory.buffer(slot * self.page_bytes, nbytes)

    def close(self) -> None:
        self._memory.close()
