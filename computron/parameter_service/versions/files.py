"""One safetensors file that several processes write together, each the ranges that it has.

While it is written it is called `<path>.partial`; `finish` gives it its name, and from then on it does not change. Who
dies in the middle leaves a `.partial` file and nothing else. The header is the same bytes in every process, so that
whoever comes first writes it; a lock on the file lets one do so at a time, and is gone with a process that dies. What
is written and synced is marked in a file beside it: whoever finishes it sees by that whether all have written to this
folder.

What may be written once more, of another history, is called `<path>.<history>.partial` meanwhile: what is late of the
older one does not get into the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from computron.errors import CheckpointError, StorageFailed
from computron.parameter_service.versions.header import DTYPES, Tensor, make_header, read_header

Buffer = bytes | bytearray | memoryview

PARTIAL = ".partial"
MARKS = ".blocks"
MARK = b"\1"
NEW_MODE = 0o644
FINISHED_MODE = 0o444
MAKE_ROOM = "free space on its disk or name a folder on another one"
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: "raise this process's limit of file size (ulimit -f)",
    errno.ENAMETOOLONG: "choose shorter names for the job and its versions",
}
OTHER_REMEDY = "see that the folder can be written and its disk is in order"


class SharedFile:
    """Open for writing in this process. Not for several threads at once."""

    def __init__(self, path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str], history: int = 0) -> None:
        """Makes the partial file, and its folder, where they are not there yet.

        Raises ValueError for tensors that fit no file, CheckpointError if the file is finished or one of another layout
        is being written under this name, StorageFailed if the disk does not take it.
        """
        self.path = path
        self._marks = marks_path(path, history)
        self._partial = partial_path(path, history)
        self._header = make_header(tensors, metadata)
        self._entries = [self._header.entries[name] for name, _, _ in tensors]
        self._element_sizes = [DTYPES[dtype].size for _, dtype, _ in tensors]
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open(path, self._partial)
        try:
            with _storage_errors(path):
                self._begin()
        except BaseException:
            self.close()
            raise

    def write(self, tensor: int, start: int, data: Buffer) -> None:
        """Puts `data`, elements of the tensor's own dtype, at its element `start`. tensor: its place in `tensors`.

        Raises ValueError if they do not fit the tensor, StorageFailed if the disk does not take them.
        """
        entry, element = self._entries[tensor], self._element_sizes[tensor]
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else memoryview(b"")  # an empty one cannot be cast
        offset = start * element
        if start < 0 or len(rest) % element or offset + len(rest) > entry.nbytes:
            raise ValueError(
                f"{len(rest)} bytes from element {start} on do not fit {entry.name}, which has {entry.nbytes} bytes"
            )
        offset += entry.offset
        with _storage_errors(self.path):
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written

    def sync(self) -> None:
        """What was written outlasts a loss of power. Raises StorageFailed; the file must then be written anew."""
        with _storage_errors(self.path):
            os.fsync(self._descriptor)

    def mark(self, places: Iterable[int]) -> None:
        """Note, in a file beside it, that all of these is written and synced.

        Raises StorageFailed, CheckpointError if it was discarded meanwhile: another of this name may have been begun.
        """
        with _storage_errors(self.path), _locked(self._descriptor):
            if not _is_at(self._descriptor, self._partial):
                if self.path.exists():
                    return
                raise CheckpointError(f"{self.path}: was discarded while it was written; write it again")
            descriptor = os.open(self._marks, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, NEW_MODE)
            try:
                for place in places:
                    os.pwrite(descriptor, MARK, place)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SharedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        """Writes the header and sets the size, unless another process has.

        1. The file holds nothing, or the beginning of our header: who began it died, or nobody did. Write it.
        2. It has our size and our header: it is the same file.
        3. Else: something other is written under this name.
        """
        raw = self._header.raw
        with _locked(self._descriptor):
            size = os.fstat(self._descriptor).st_size
            there = os.pread(self._descriptor, len(raw), 0)
            if size <= len(raw) and raw.startswith(there):
                rest = raw[size:]
                while rest:
                    rest = rest[os.pwrite(self._descriptor, rest, len(raw) - len(rest)) :]
                os.ftruncate(self._descriptor, self._header.size)
            elif size != self._header.size or there != raw:
                raise CheckpointError(
                    f"{self._partial}: other tensors or metadata are being written under this name; "
                    "remove the file if nobody writes it any more, or choose another name"
                )


def partial_path(path: Path, history: int = 0) -> Path:
    return path.with_name(f"{path.name}.{history}{PARTIAL}" if history else f"{path.name}{PARTIAL}")


def marks_path(path: Path, history: int = 0) -> Path:
    return path.with_name(f"{path.name}.{history}{MARKS}" if history else f"{path.name}{MARKS}")


def is_marked(path: Path, count: int, history: int = 0) -> bool:
    """Whether all places below `count` have been marked. Raises StorageFailed."""
    with _storage_errors(path):
        try:
            return marks_path(path, history).read_bytes()[:count] == MARK * count
        except FileNotFoundError:
            return False


def finish(path: Path, history: int = 0, count: int = 0) -> None:
    """Gives the file its name and makes it read-only; all processes have written and synced before. May come twice.
    count: so many places must have been marked.

    Raises CheckpointError if there is no such file or marks are missing, StorageFailed if the disk does not take it.
    """
    partial = partial_path(path, history)
    with _storage_errors(path):
        while not path.exists():
            try:
                descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if path.exists():
                    return  # another has finished it just now
                raise CheckpointError(f"{path}: was never begun, or was discarded; write it again") from None
            try:
                if count and not is_marked(path, count, history):
                    raise CheckpointError(
                        f"{path}: not all of it was written to this folder; give all aggregators the same one"
                    )
                _finish(descriptor, partial, path)
            finally:
                os.close(descriptor)
            if history:  # no other looks for the marks: what is complete is what is in the master's log
                marks_path(path, history).unlink(missing_ok=True)


def _finish(descriptor: int, partial: Path, path: Path) -> None:
    with _locked(descriptor):
        if not _is_at(descriptor, partial):
            return
        read_header(descriptor, partial)
        os.fchmod(descriptor, FINISHED_MODE)
        os.fsync(descriptor)
        partial.rename(path)
        _sync_folder(path.parent)


def discard(path: Path, history: int = 0, step: int | None = None) -> None:
    """Removes what was written of an unfinished file. May come twice; a finished one stays. step: so does one whose
    metadata name another step. Raises StorageFailed.
    """
    partial = partial_path(path, history)
    with _storage_errors(path):
        if step is None:
            partial.unlink(missing_ok=True)
            marks_path(path, history).unlink(missing_ok=True)
            return
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            _discard(descriptor, partial, marks_path(path, history), step)
        finally:
            os.close(descriptor)


def _discard(descriptor: int, partial: Path, marks: Path, step: int) -> None:
    with _locked(descriptor):
        if not _is_at(descriptor, partial):
            return
        try:
            header = read_header(descriptor, partial)
        except CheckpointError:
            os.ftruncate(descriptor, 0)  # nobody has come to write data: whoever is next begins it anew
            return
        if header.metadata.get("step") == str(step):
            marks.unlink(missing_ok=True)
            partial.unlink()


def _open(path: Path, partial: Path) -> int:
    """The partial file that stands under its name now, not one that was finished or discarded meanwhile."""
    while not path.exists():
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, NEW_MODE)
        try:
            with _locked(descriptor):
                if _is_at(descriptor, partial):
                    if not path.exists():
                        return descriptor
                    partial.unlink()  # made here, after the other became the finished file
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise CheckpointError(f"{path}: is finished, and a finished file does not change; choose another name")


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, OTHER_REMEDY)
        raise StorageFailed(f"{path} cannot be written: {error.strerror}; {remedy}") from error
