"""Parameter images that can be read piece by piece, from several threads: from safetensors, or from tensors at hand."""

from __future__ import annotations

import bisect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from computron.errors import CheckpointError
from computron.memory.images import FileExtent
from computron.models.layout import Layout, TensorSlot
from computron.models.safetensors_file import FETCH_AGAIN, FileTensor

CONVERSION_CHUNK = 1 << 20  # elements that are converted at once
SHORT_RUN = 128 << 10  # runs shorter than what the kernel reads ahead by itself are announced to it
Run = tuple[int, int]  # first byte in a tensor, and bytes


class LaidOutImage(ABC):
    """What every image shares: it walks the tensors under a piece of the range and zeroes the gaps."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._offsets = [slot.offset for slot in layout.slots]

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def segment_ends(self) -> Sequence[int]:
        return self.layout.segment_ends

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the image's bytes from `offset` on; bytes between tensors are zero.

        Raises CheckpointError, with the file and the tensor, if they cannot be read.
        """
        buffer = buffer.cast("B")
        done = 0
        for slot, start, nbytes in self._pieces(offset, len(buffer)):
            at = slot.offset + start - offset
            buffer[done:at] = bytes(at - done)
            self.read_tensor(slot, start, buffer[at : at + nbytes])
            done = at + nbytes
        buffer[done:] = bytes(len(buffer) - done)

    def extents(self, offset: int, nbytes: int) -> list[FileExtent] | None:
        """Where these bytes stand on disk, gaps being zeros; None if no file holds them byte for byte."""
        extents = []
        for slot, start, length in self._pieces(offset, nbytes):
            place = self.place(slot)
            if place is None:
                return None
            path, file_offset = place
            extents.append(FileExtent(slot.offset + start, length, path, file_offset + start))
        return extents

    @abstractmethod
    def read_tensor(self, slot: TensorSlot, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from its byte `start` on."""

    def read_runs(self, slot: TensorSlot, runs: Sequence[Run], buffer: memoryview) -> None:
        """Fill `buffer` with these pieces of the tensor, which ascend, one after the other."""
        done = 0
        for start, nbytes in runs:
            self.read_tensor(slot, start, buffer[done : done + nbytes])
            done += nbytes

    def place(self, slot: TensorSlot) -> tuple[Path, int] | None:
        """File and offset where the tensor stands byte for byte; None if nowhere."""
        return None

    def _pieces(self, offset: int, nbytes: int) -> list[tuple[TensorSlot, int, int]]:
        """(tensor, first byte in it, bytes) for each tensor under [offset, offset + nbytes)."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) is outside an image of {self.nbytes} bytes")
        pieces = []
        index = max(bisect.bisect_right(self._offsets, offset) - 1, 0)
        for slot in self.layout.slots[index:]:
            if slot.offset >= offset + nbytes:
                break
            begin = max(offset, slot.offset)
            end = min(offset + nbytes, slot.offset + slot.nbytes)
            if begin < end:
                pieces.append((slot, begin - slot.offset, end - begin))
        return pieces


class CheckpointImage(LaidOutImage):
    """Read from safetensors files, straight into the buffer where the dtype is the file's. Holds no file open."""

    def __init__(self, layout: Layout, tensors: Mapping[str, FileTensor]) -> None:
        """`tensors`: for each name of the layout, where it stands."""
        super().__init__(layout)
        self._tensors = tensors
        self._stamps = {path: _stamp(path) for path in {tensor.path for tensor in tensors.values()}}

    def place(self, slot: TensorSlot) -> tuple[Path, int] | None:
        tensor = self._tensors[slot.name]
        return (tensor.path, tensor.offset) if tensor.dtype == slot.dtype else None

    def read_tensor(self, slot: TensorSlot, start: int, buffer: memoryview) -> None:
        self.read_runs(slot, [(start, len(buffer))], buffer)

    def read_runs(self, slot: TensorSlot, runs: Sequence[Run], buffer: memoryview) -> None:
        tensor = self._tensors[slot.name]
        try:
            file = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: {error.strerror} (tensor {slot.name}); {FETCH_AGAIN}") from error
        try:
            if _stamp(file) != self._stamps[tensor.path]:
                raise CheckpointError(f"{tensor.path}: changed while it was served (tensor {slot.name}); load it again")
            if len(runs) > 1 and runs[0][1] < SHORT_RUN:
                _announce(file, tensor, slot, runs)
            done = 0
            for start, nbytes in runs:
                piece = buffer[done : done + nbytes]
                if tensor.dtype == slot.dtype:
                    _read_exactly(file, tensor, tensor.offset + start, piece)
                else:
                    _convert(file, tensor, slot, start, piece)
                done += nbytes
        finally:
            os.close(file)


class StateImage(LaidOutImage):
    """Copied from tensors that `make` gives when they are first needed, and that are let go once all has been read."""

    def __init__(
        self,
        layout: Layout,
        make: Callable[[], Mapping[str, torch.Tensor]],
        first: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`make`: the tensors by name, the same ones each time. `first`: those of its first call, if it was made."""
        super().__init__(layout)
        self.make = make
        self._lock = threading.Lock()
        self._state = None if first is None else {slot.name: _flat(slot, first) for slot in layout.slots}
        self._unread = self._total = sum(slot.nbytes for slot in layout.slots)

    def read_tensor(self, slot: TensorSlot, start: int, buffer: memoryview) -> None:
        with self._lock:
            if self._state is None:
                made = self.make()
                self._state = {slot.name: _flat(slot, made) for slot in self.layout.slots}
                self._unread = self._total
            flat = self._state[slot.name]
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat[start : start + len(buffer)])
        with self._lock:
            self._unread -= len(buffer)
            if self._unread <= 0:
                self._state = None


def tensors_equal(a: FileTensor, b: FileTensor) -> bool:
    """Whether two tensors of a checkpoint hold the same values. Reads until the first difference."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = 4 << 20
    with a.path.open("rb") as left, b.path.open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        for begin in range(0, a.nbytes, step):
            size = min(step, a.nbytes - begin)
            if left.read(size) != right.read(size):
                return False
    return True


def _flat(slot: TensorSlot, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = state.get(slot.name)
    if tensor is None or tuple(tensor.shape) != slot.shape:
        found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
        raise CheckpointError(f"tensor {slot.name} {found}, shape {list(slot.shape)} was planned")
    return tensor.detach().to("cpu", slot.dtype).contiguous().reshape(-1).view(torch.uint8)


def _stamp(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _announce(file: int, tensor: FileTensor, slot: TensorSlot, runs: Sequence[Run]) -> None:
    """Let the disk read from the first run to the last in one go, instead of waiting for it at each of them."""
    begin = runs[0][0] // slot.dtype.itemsize * tensor.dtype.itemsize
    end = -(-sum(runs[-1]) // slot.dtype.itemsize) * tensor.dtype.itemsize
    os.posix_fadvise(file, tensor.offset + begin, end - begin, os.POSIX_FADV_WILLNEED)


def _read_exactly(file: int, tensor: FileTensor, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: {error.strerror} while reading tensor {tensor.name}") from error
        if count == 0:
            raise CheckpointError(f"{tensor.path}: truncated inside tensor {tensor.name}; {FETCH_AGAIN}")
        done += count


def _convert(file: int, tensor: FileTensor, slot: TensorSlot, start: int, buffer: memoryview) -> None:
    """Read elements of the file's dtype and write those of the image's; the ends may cut an element in two."""
    target, source = slot.dtype.itemsize, tensor.dtype.itemsize
    done = 0
    while done < len(buffer):
        element, skip = divmod(start + done, target)
        count = min(CONVERSION_CHUNK, -(-(skip + len(buffer) - done) // target))
        raw = bytearray(count * source)
        _read_exactly(file, tensor, tensor.offset + element * source, memoryview(raw))
        converted = torch.frombuffer(raw, dtype=tensor.dtype).to(slot.dtype).view(torch.uint8)
        size = min(count * target - skip, len(buffer) - done)
        torch.frombuffer(buffer[done : done + size], dtype=torch.uint8).copy_(converted[skip : skip + size])
        done += size
