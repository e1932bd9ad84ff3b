"""The thread that copies states to files while the job trains: snapshots and versions."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
from torch import Tensor

from computron.errors import CheckpointError, StorageFailed
from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.specs import PARAMETERS
from computron.parameter_service.versions.files import discard
from computron.parameter_service.versions.names import snapshot_path, version_path
from computron.parameter_service.versions.snapshot import SnapshotMissing, SnapshotReader, SnapshotWriter
from computron.parameter_service.versions.version import VersionWriter
from computron.parameter_service.wire.messages import NO_FOLDER, Extra, Saved

log = logging.getLogger(__name__)

TOLD_AGAIN = 64  # files of a job, the newest: a master may have missed what was told of them
LEFT = 8  # jobs that are not here any more, the last, whose files are told again, too


class Save:
    """Blocks of one job that go to one file. version: "" for a snapshot."""

    def __init__(self, job: Job, blocks: Sequence[HeldBlock], step: int, version: str, path: Path) -> None:
        self.job = job
        self.blocks = tuple(blocks)
        self.step = step
        self.version = version
        self.path = path
        self.epoch = job.epoch
        self.history = job.history if version else 0
        self.begun = self.cancelled = False
        self._taken: dict[int, tuple[dict[str, Tensor], int]] = {}

    @property
    def file(self) -> tuple[Path, int]:
        """What it goes into, together with others."""
        return self.path, self.history

    def take(self, block: HeldBlock) -> None:
        index = block.block.index
        if not self.cancelled and index not in self._taken:
            names = [PARAMETERS] if self.version else list(block.parts)
            self._taken[index] = ({name: block.parts[name].clone() for name in names}, block.updates)

    def forget(self, block: HeldBlock) -> None:
        """Nobody will write the block. Its lock is held."""
        if self in block.wanted:
            block.wanted.remove(self)
        self._taken.pop(block.block.index, None)

    def begin(self) -> VersionWriter | SnapshotWriter:
        """Raises as SharedFile does, and Cancelled."""
        if self.cancelled:
            raise Cancelled
        if self.version:
            return VersionWriter(self.path, self.job.spec, version=self.version, step=self.step, history=self.history)
        return SnapshotWriter(self.path, self.job.spec, step=self.step, epoch=self.epoch)

    def write(self, file: VersionWriter | SnapshotWriter) -> None:
        """Raises as SharedFile does, and Cancelled."""
        for block in self.blocks:
            parts, updates = self._copy(block)
            if isinstance(file, VersionWriter):
                file.write_block(block.block, parts[PARAMETERS])
            else:
                file.write_block(block.block, parts, updates)

    def _copy(self, block: HeldBlock) -> tuple[dict[str, Tensor], int]:
        with block.lock:
            self.take(block)
            if self in block.wanted:
                block.wanted.remove(self)
        if self.cancelled:
            raise Cancelled
        return self._taken.pop(block.block.index)


class Cancelled(Exception):
    """The job was put back to another state meanwhile: the file is of no use."""


class Saver:
    """saved, failed, unpublished: told in the event loop's thread; the last of a version's name and step, why there is
    none, and its file and history. free: a block's state has been copied and may leave.
    """

    def __init__(
        self,
        directory: Path | None,
        saved: Callable[[Saved], None],
        failed: Callable[[Job, str, str], None],
        free: Callable[[Job, Sequence[HeldBlock]], None],
        unpublished: Callable[[Job, str, int, str, Path | None, int], None],
    ) -> None:
        self._directory = directory
        self._saved = saved
        self._failed = failed
        self._unpublished = unpublished
        self._free = free
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "migration")
        self._pending: set[Save] = set()
        self._told: dict[str, dict[tuple[str, int], Saved]] = {}  # by job and file
        self._left: dict[str, None] = {}  # jobs that are not here any more
        self._half_written: dict[str, Path] = {}  # by job; of the saving thread
        self._beginning = threading.Lock()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def save(self, job: Job, blocks: Sequence[HeldBlock], step: int, version: str = "") -> None:
        """These blocks as they are now, which is after `step`."""
        if self._directory is None:
            if version or job.trouble != NO_FOLDER or job.kept is not None:  # else it has been told
                self._fail(job, step, version, NO_FOLDER, None, job.history)
            return
        name = job.spec.job
        path = version_path(self._directory, name, version) if version else None
        self._left.pop(name, None)
        save = Save(job, blocks, step, version, path or snapshot_path(self._directory, name, step, job.epoch))
        for block in blocks:
            block.wanted.append(save)
        with self._beginning:
            self._pending.add(save)
        self._thread.submit(self._write, save)
        if not version and job.kept is None:
            self._overtake(job, step - job.snapshot_stride)

    def _overtake(self, job: Job, step: int) -> None:
        """No step waits for a snapshot: those before this step that are not begun are given up, or their copies would
        pile up. The last two stay: when steps are limited again, a limit that follows from one of them lets them go on.
        """
        with self._beginning:
            late = [save for save in self._pending if save.job is job and not save.version and not save.begun]
            late = [save for save in late if save.step < step]
            for save in late:
                save.begun = save.cancelled = True
        for save in late:
            self._loop.call_soon(self._written, save, None)

    def extra(self, job: Job, message: Extra, data: bytearray, then: Callable[[], None]) -> None:
        """A tensor that is not trained, for the file of a version. `then` is called when it is there or cannot be; not
        if the job has come into another epoch before.
        """
        if self._directory is None:
            then()  # those who save its blocks say why
            return
        path = version_path(self._directory, job.spec.job, message.version)
        self._thread.submit(self._write_extra, job, message, data, path, job.history, then)

    def cancel(self, job: Job, *, versions: bool) -> None:
        """The job's state will be another one: what has not been copied yet must not be, and no file that was ordered
        before is begun when this returns. versions: those too, not only snapshots, and nothing of it is told again.
        """
        if versions:
            self._told.pop(job.spec.job, None)
        with self._beginning:
            for save in self._pending:
                if save.job is job and (versions or not save.version):
                    save.cancelled = True

    def left(self, job: str) -> None:
        """The job is not here any more. What was ordered before is written and told; of a few such jobs also again."""
        self._left.pop(job, None)
        self._left[job] = None
        self._forget_left()

    def _forget_left(self) -> None:
        for name in list(self._left)[:-LEFT]:
            self._told.pop(name, None)
            if not any(save.job.spec.job == name for save in self._pending):
                del self._left[name]

    def restore(self, job: Job, blocks: Sequence[HeldBlock], path: Path, then: Callable[[], None]) -> None:
        """Fill the blocks from a snapshot; `then` is called when they are."""
        self._thread.submit(self._read, job, tuple(blocks), path, job.epoch, then)

    def kept(self, job: str, step: int) -> None:
        """The job's snapshot of this step is complete: it and those before it need not be told again."""
        told = self._told.get(job, {})
        for file in [file for file, saved in told.items() if not saved.version and saved.step <= step]:
            del told[file]

    def tell_again(self) -> None:
        """What was told while the master was away, it has not heard; and what it heard before it was started again of
        files that were not complete, it has forgotten.
        """
        for told in self._told.values():
            for saved in told.values():
                self._saved(saved)

    async def written(self) -> None:
        """Wait until all that was ordered has been written, or cannot be, and was told."""
        await self._loop.run_in_executor(self._thread, _nothing)

    def _write(self, save: Save) -> None:
        """With all that has been ordered for the same file meanwhile."""
        with self._beginning:
            if save.begun:
                return
            alike = [other for other in self._pending if other.file == save.file and not other.begun]
            together = [other for other in alike if other.cancelled == save.cancelled]
            for other in together:
                other.begun = True
        error: Exception | None = None
        try:
            with self._beginning:
                file = save.begin()
            self._make_room(save)
            with file:
                for other in together:
                    other.write(file)
                file.sync()
                file.mark([block.block.index for other in together for block in other.blocks])
        except Exception as raised:
            error = raised
            if not save.version:
                self._half_written[save.job.spec.job] = save.path
        for other in together:
            self._loop.call_soon_threadsafe(self._written, other, error)

    def _make_room(self, save: Save) -> None:
        """What a snapshot of the job has left that failed here, and so will never be complete, is removed."""
        half = self._half_written.pop(save.job.spec.job, save.path) if not save.version else save.path
        if half != save.path:
            with suppress(StorageFailed):
                discard(half)

    def _written(self, save: Save, error: Exception | None) -> None:
        with self._beginning:
            self._pending.discard(save)
        for block in save.blocks:
            with block.lock:
                save.forget(block)
        if error is None and not save.cancelled:
            indices = tuple(block.block.index for block in save.blocks)
            self._tell(Saved(save.job.spec.job, save.version, save.step, str(save.path), indices, (), save.history))
            if not save.version:
                for block in save.blocks:
                    block.saved = max(block.saved, save.step)
        elif error is not None and not save.cancelled:
            self._fail(save.job, save.step, save.version, _told(save.path, error), *save.file)
        self._free(save.job, save.blocks)

    def _fail(self, job: Job, step: int, version: str, reason: str, path: Path | None, history: int) -> None:
        """Without snapshots a failure costs more; without a version it does not."""
        if version:
            self._unpublished(job, version, step, reason, path, history)
        else:
            self._failed(job, "save", reason)

    def _tell(self, saved: Saved) -> None:
        told = self._told.setdefault(saved.job, {})
        before = told.pop((saved.path, saved.history), None)
        whole = saved
        if before is not None:
            blocks, extras = {*before.blocks, *saved.blocks}, {*before.extras, *saved.extras}
            whole = msgspec.structs.replace(saved, blocks=tuple(sorted(blocks)), extras=tuple(sorted(extras)))
        told[saved.path, saved.history] = whole
        for oldest in list(told)[:-TOLD_AGAIN]:
            del told[oldest]
        self._saved(saved)
        self._forget_left()

    def _write_extra(
        self, job: Job, message: Extra, data: bytearray, path: Path, history: int, then: Callable[[], None]
    ) -> None:
        error: Exception | None = None
        try:
            with self._beginning:
                if job.epoch != message.epoch:
                    return
                if path.exists():  # it is in there, or whoever saves the blocks says why not
                    self._loop.call_soon_threadsafe(then)
                    return
                version = VersionWriter(path, job.spec, version=message.version, step=message.step, history=history)
            with version:
                version.write_extra(message.tensor, data)
                version.sync()
                version.mark(extras=[message.tensor])
        except Exception as raised:
            error = raised
        self._loop.call_soon_threadsafe(self._extra_written, job, message, path, history, then, error)

    def _extra_written(
        self,
        job: Job,
        message: Extra,
        path: Path,
        history: int,
        then: Callable[[], None],
        error: Exception | None,
    ) -> None:
        if job.epoch != message.epoch:
            return  # it may have been discarded: whoever sent it sends it again, if it still belongs there
        if error is None:
            saved = Saved(message.job, message.version, message.step, str(path), (), (message.tensor,), history)
            self._tell(saved)
        else:
            self._fail(job, message.step, message.version, _told(path, error), path, history)
        then()

    def _read(self, job: Job, blocks: Sequence[HeldBlock], path: Path, epoch: int, then: Callable[[], None]) -> None:
        error: Exception | None = None
        try:
            with SnapshotReader(path, job.spec) as snapshot:
                for block in blocks:
                    with block.lock:
                        for part, values in block.parts.items():
                            snapshot.read_block(block.block, part, values)
                        block.updates = snapshot.read_updates(block.block)
        except Exception as raised:
            error = raised
        self._loop.call_soon_threadsafe(self._restored, job, epoch, then, error)

    def _restored(self, job: Job, epoch: int, then: Callable[[], None], error: Exception | None) -> None:
        if job.epoch != epoch:
            return
        if error is not None:
            self._failed(job, _restoring(error), f"the snapshot cannot be taken up: {error}")
        else:
            then()


def _nothing() -> None: ...


def _told(path: Path, error: Exception) -> str:
    """Why nothing came about of this file, which most errors name."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def _restoring(error: Exception) -> str:
    """What cannot be carried out: whether the snapshot is bad, or there is none, or it cannot be read here."""
    if isinstance(error, SnapshotMissing):
        return "find"
    return "restore" if isinstance(error, CheckpointError) else "host"
