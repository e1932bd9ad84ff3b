"""Pages on disk: byte for byte in a checkpoint, or in the store's spill file."""

from __future__ import annotations

import errno
import heapq
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from computron.errors import CheckpointError, OutOfMemory

log = logging.getLogger(__name__)

BLOCK: Final = 256 << 10


class CheckpointFile:
    """A file as it was when pages were loaded from it. Opened when a page of it first has to stay on disk only."""

    def __init__(self, path: Path, status: os.stat_result) -> None:
        self.path = path
        self.identity = _identity(status)
        self._descriptor: int | None = None
        self._lost: str | None = None

    def descriptor(self) -> int:
        """An open descriptor of the very file that was loaded.

        Raises CheckpointError, from then on always, if it has been changed, replaced or removed since.
        """
        if self._lost is None:
            try:
                if self._descriptor is None:
                    self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                if _identity(os.fstat(self._descriptor)) == self.identity:
                    return self._descriptor
                self._lost = f"{self.path} has changed on disk since it was loaded; load the model again"
            except OSError as error:
                self._lost = f"{self.path} cannot be read any more ({error.strerror}); load the model again"
            log.warning(self._lost)  # an open descriptor stays open: a transfer may be reading from it
        raise CheckpointError(self._lost)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class CheckpointFiles:
    """The files that pages may come back from, each as long as a page counts on it. The caller holds a lock."""

    def __init__(self) -> None:
        self._files: dict[tuple[Path, tuple[int, int, int, int]], CheckpointFile] = {}
        self._users: dict[CheckpointFile, int] = {}

    @property
    def in_use(self) -> set[CheckpointFile]:
        return set(self._users)

    def acquire(self, path: Path, status: os.stat_result) -> CheckpointFile:
        file = self._files.setdefault((path, _identity(status)), CheckpointFile(path, status))
        self._users[file] = self._users.get(file, 0) + 1
        return file

    def release(self, file: CheckpointFile) -> None:
        self._users[file] -= 1
        if self._users[file] == 0:
            del self._users[file], self._files[file.path, file.identity]
            file.close()

    def close(self) -> None:
        for file in self._users:
            file.close()


@dataclass(frozen=True, slots=True)
class PageExtent:
    """`nbytes` of a page at `offset` stand in `file` at `file_offset`."""

    offset: int
    nbytes: int
    file: CheckpointFile
    file_offset: int


class SpillFile:
    """Slots for pages that no checkpoint holds, in one nameless file that goes away with the process.

    `allocate` and `release` want the caller's lock; `write` does not.
    """

    def __init__(self, directory: Path | None, page_bytes: int) -> None:
        self._directory = Path(directory) if directory is not None else Path(tempfile.gettempdir())
        self._page_bytes = page_bytes
        self._descriptor: int | None = None
        self._slots = 0
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Pages in the file."""
        return self._slots - len(self._free)

    def allocate(self) -> int:
        """A free slot. Raises OutOfMemory if the file cannot be made."""
        if self._descriptor is None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._descriptor, path = tempfile.mkstemp(prefix="computron-spill-", dir=self._directory)
                os.unlink(path)
            except OSError as error:
                raise self._error(error) from error
        if self._free:
            return heapq.heappop(self._free)
        self._slots += 1
        return self._slots - 1

    def release(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def location(self, slot: int) -> tuple[int, int]:
        """Descriptor and offset of a slot."""
        assert self._descriptor is not None
        return self._descriptor, slot * self._page_bytes

    def write(self, slot: int, page: memoryview) -> None:
        """Raises OutOfMemory, with the system's words and the remedy, if the disk does not take it."""
        descriptor, offset = self.location(slot)
        written = 0
        while written < page.nbytes:
            try:
                written += os.pwrite(descriptor, page[written:], offset + written)
            except OSError as error:
                raise self._error(error) from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _error(self, error: OSError) -> OutOfMemory:
        remedy = " or set host.spill_directory to a larger disk" if error.errno == errno.ENOSPC else ""
        return OutOfMemory(
            f"the host budget is full and pages cannot be written to {self._directory} ({error.strerror}): "
            f"raise host.memory{remedy}"
        )


def read_blocks(extents: Sequence[tuple[int, int, int, int]], nbytes: int) -> Iterator[tuple[int, bytes]]:
    """The bytes of a page on disk, (offset in page, bytes) in order; gaps are zeros.

    `extents`: (offset in page, nbytes, file descriptor, file offset) each. Raises CheckpointError on a short file.
    """
    position = 0
    for offset, length, descriptor, file_offset in [*sorted(extents), (nbytes, 0, -1, 0)]:
        while position < offset:
            size = min(BLOCK, offset - position)
            yield position, bytes(size)
            position += size
        end = offset + length
        while position < end:
            block = os.pread(descriptor, min(BLOCK, end - position), file_offset + position - offset)
            if not block:
                raise CheckpointError("a checkpoint file is shorter than when it was loaded; load the model again")
            yield position, block
            position += len(block)
