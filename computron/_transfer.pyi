"""The extension: bytes between host and device. Types of csrc/bindings.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

class TransferError(RuntimeError):
    """A backend call failed; carries the backend's words (for CUDA the driver's name and text of the error)."""

class DeviceFailed(TransferError):
    """A sticky error: this device can do nothing more until the process is restarted."""

def cuda_unavailable_reason(library: str | None = None) -> str | None:
    """None if a CUDA device can be used; otherwise why not, in words for a person. `library`: as of `cuda_backend`."""

def page_digest(address: int, nbytes: int) -> bytes:
    """16 bytes: XXH64 of every 4 KiB leaf, then XXH64 of the leaves' digests with seeds 0 and 1. Releases the GIL."""

@final
class Backend:
    """One device. Thread-safe."""

    @property
    def kind(self) -> str: ...  # "host" | "cuda"
    @property
    def device_name(self) -> str: ...
    @property
    def device_index(self) -> int: ...
    @property
    def granularity(self) -> int: ...  # the smallest frame
    @property
    def free_memory(self) -> int: ...
    @property
    def host_accessible(self) -> bool:
        """True if the CPU can read device addresses; DLPack capsules then say CPU, else CUDA."""
    @property
    def failed(self) -> str | None: ...  # words of the sticky error, if any
    def inject_fault(self, operation: str, after: int, message: str) -> None:
        """Host and stand-in only: the call number `after` (0: the next) of "copy", "map" or "create" fails once.

        "device": copy number `after` and everything from then on fails (a sticky error).
        """

def host_backend(
    *, link_bandwidth: float | None = None, link_latency: float = 0.0, copy_threads: int = 1
) -> Backend: ...
def cuda_backend(index: int = 0, *, library: str | None = None) -> Backend:
    """`library`: path of the driver, "libcuda.so.1" if None. Raises TransferError with the reason."""

@final
class DevicePool:
    """`frames` frames of `frame_bytes` each, reserved now and held until `close`."""

    def __init__(self, backend: Backend, frame_bytes: int, frames: int) -> None: ...
    @property
    def frame_bytes(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def free(self) -> int:
        """Frames that can be allocated now. Frames freed while a chunk is in flight to them count only after it."""
    def allocate(self, count: int) -> list[int]:
        """Raises TransferError, and takes nothing, if fewer are free."""
    def release(self, frames: Sequence[int]) -> None:
        """Raises on a frame that is not allocated (a double free)."""
    def digest(self, frame: int, nbytes: int) -> bytes:
        """`page_digest` of what the frame holds, computed where the frame is (CUDA kernel, or after a copy back)."""
    def read(self, frame: int, offset: int, nbytes: int) -> bytes:
        """The frame's bytes, copied to the host (tests, verification)."""
    def write(self, frame: int, offset: int, data: bytes) -> None: ...
    def close(self) -> None: ...

@final
class AddressRange:
    """`nbytes` (rounded up to frames) of device addresses; reading an unmapped part is a fault."""

    def __init__(self, pool: DevicePool, nbytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def map(self, slots: Sequence[int], frames: Sequence[int]) -> None:
        """Map frames[i] at slot slots[i] (slot k covers bytes k*frame_bytes ...). A mapped slot is an error.

        A frame may be mapped at several places. Neighbours are joined to one call where the backend can.
        """
    def unmap(self, slots: Sequence[int]) -> None: ...
    def mapped(self) -> list[int]:
        """Frame of each slot, -1 where none is mapped."""
    def dlpack(self) -> Any:
        """A DLPack capsule of the whole range as uint8; keeps the range alive."""
    def close(self) -> None: ...

@final
class HostMemory:
    """A region of host memory for pages: reserved at once, committed (and pinned, for CUDA) slab by slab."""

    def __init__(self, backend: Backend, nbytes: int, *, numa_node: int = -1, slab_bytes: int = 0) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def committed(self) -> int: ...
    def commit(self, offset: int, nbytes: int, threads: int = 1) -> None:
        """Touch (in parallel) and pin; whole slabs. Idempotent. Releases the GIL."""
    def discard(self, offset: int, nbytes: int) -> None:
        """Host: give the pages back to the system; they read as zeros and come back when touched.
        CUDA: nothing happens, since pinned pages cannot leave."""
    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """Writable; keeps the memory mapped, also after `close`."""
    def close(self) -> None:
        """Freed once the last buffer is gone and the last transfer that uses it has ended."""

@final
class Source:
    """Where a page's bytes come from."""

    @staticmethod
    def pinned(address: int) -> Source:
        """Memory of a HostMemory, committed, the page within one slab (slab_bytes 0: 64 MiB): goes straight."""
    @staticmethod
    def pageable(address: int) -> Source:
        """Any other memory: goes through the staging ring on CUDA. Must stay until the transfer has ended."""
    @staticmethod
    def file(extents: Sequence[tuple[int, int, int, int]], keep: int = 0) -> Source:
        """(offset in page, nbytes, file descriptor, file offset) each; gaps are zeros. Goes through the staging ring.
        The descriptors must stay open until the transfer has ended.

        `keep`: address in a HostMemory where the page's bytes shall also stay (read there, then sent from there).
        """

@final
class Transfer:
    """A job. All waits release the GIL."""

    @property
    def id(self) -> int: ...
    @property
    def state(self) -> str: ...  # "queued" | "running" | "done" | "cancelled" | "failed"
    @property
    def error(self) -> str | None: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def seconds(self) -> float: ...  # from first chunk to last, 0 before the end
    def page_done(self, index: int) -> bool:
        """True once every byte of pages[index] is on the device."""
    def segment_done(self, segment: int) -> bool: ...
    def wait_segment(self, segment: int, stream: int = 0) -> None:
        """Host: block until the segment is there. CUDA: block only until its last chunk is submitted, then make
        `stream` wait for it on the device. Raises TransferError if the job failed or was cancelled."""
    def wait(self, timeout: float | None = None) -> bool:
        """Until done, cancelled or failed; False on timeout. Raises nothing."""
    def raise_priority(self, priority: int, deadline: float = ...) -> None: ...
    def cancel(self) -> None:
        """No further chunk starts. Ends in "cancelled" once the chunks in flight have ended, or "done"."""

@final
class TransferEngine:
    """One worker thread a direction. Order: priority (smaller first), deadline (earlier first), sequence."""

    def __init__(
        self,
        backend: Backend,
        pool: DevicePool,
        *,
        chunk_bytes: int,
        depth: int = 3,
        staging_chunks: int = 4,
    ) -> None: ...
    def submit(
        self,
        frames: Sequence[int],
        sources: Sequence[Source],
        page_bytes: Sequence[int],
        segment_pages: Sequence[int],
        *,
        priority: int = 0,
        deadline: float = ...,
    ) -> Transfer:
        """Copy sources[i] (page_bytes[i] bytes, at most a frame) into frames[i], in this order.

        segment_pages[k]: number of pages of segment k; their sum is len(frames). 0 is allowed (done at once).
        Raises ValueError if the lengths disagree, TransferError if a frame is not allocated or a source not pinned.
        A frame that is released before its page has arrived becomes free only then.
        """
    def fetch(
        self,
        frames: Sequence[int],
        addresses: Sequence[int],
        page_bytes: Sequence[int],
        *,
        priority: int = 0,
        deadline: float = ...,
    ) -> Transfer:
        """The other direction: page_bytes[i] bytes of frames[i] to addresses[i] in a HostMemory. One segment."""
    @property
    def completions_fd(self) -> int:
        """An eventfd, readable when a transfer has ended."""
    def completions(self) -> list[Transfer]:
        """Transfers that ended since the last call; resets the eventfd. Never blocks."""
    def statistics(self) -> dict[str, float]:
        """Of the direction to the device: bytes, chunks, seconds_busy, transfers_done, transfers_failed,
        transfers_cancelled, in_flight (chunks), queued (transfers with chunks to send)."""
    def close(self) -> None:
        """Cancel everything, wait for chunks in flight, join the threads. Idempotent."""
