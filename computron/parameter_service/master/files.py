"""Snapshots and versions: a file counts when all that belongs to it is there."""

from __future__ import annotations

import logging
from pathlib import Path

from computron.parameter_service.master.events import Discard, Finish, Finished, Prune
from computron.parameter_service.master.records import SnapshotSaved, VersionSaved
from computron.parameter_service.master.state import Job, State, Unfinished
from computron.parameter_service.versions.names import begun_of
from computron.parameter_service.wire.messages import Kept, Saved

log = logging.getLogger(__name__)


class Files:
    def __init__(self, state: State) -> None:
        self._state = state

    def saved(self, message: Saved, now: float) -> None:
        job = self._state.jobs.get(message.job)
        if job is None or message.path in job.book.files or not _counts(job, message):
            return
        job.saw(message.step, now)
        key = message.version, message.step, message.path
        there = job.saving.setdefault(key, Unfinished())
        there.blocks.update(message.blocks)
        there.extras.update(message.extras)
        extras = len(job.book.spec.extras) if message.version else 0
        if len(there.blocks) == len(job.layout.blocks) and len(there.extras) == extras:
            del job.saving[key]
            self._state.orders.append(Finish(job.name, *key))

    def failed(self, name: str, message: str) -> None:
        """A snapshot or a version did not come about; the job's view says so until a snapshot does."""
        log.error("file_failed job=%s reason=%s", name, message)
        job = self._state.jobs.get(name)
        if job is not None:
            job.trouble = message

    def finished(self, event: Finished) -> None:
        job = self._state.jobs.get(event.job)
        if job is None or event.path in job.book.files or not _counts(job, event):
            return
        if event.version:
            self._state.write(VersionSaved(event.job, event.version, event.step, event.path, event.at))
            log.info("version_complete job=%s version=%s step=%d", event.job, event.version, event.step)
            return
        job.trouble = ""
        self._state.write(SnapshotSaved(event.job, event.step, event.path))
        for key in [key for key in job.saving if not key[0] and key[1] < event.step]:
            del job.saving[key]  # what is missing in an older one will not come any more
        self._state.orders.append(Prune(event.path, tuple(saved.path for saved in job.book.snapshots)))
        for name in sorted(job.holders):
            self._state.tell(name, Kept(job.name, event.step))


def _counts(job: Job, file: Saved | Finished) -> bool:
    """Whether a snapshot is of a state that the job still comes from."""
    begun = begun_of(Path(file.path))
    return bool(file.version) or begun is None or job.book.counts(*begun)


def newest(job: Job) -> SnapshotSaved:
    """The complete snapshot of the last step; of two of the same step, that of the later epoch."""
    return max(job.book.snapshots, key=lambda saved: begun_of(Path(saved.path)) or (saved.step, 0))


def discard_unfinished(state: State, job: Job) -> None:
    """What is being written will not be complete: the job goes on from another step, or is no more."""
    state.orders.extend(Discard(path) for version, _, path in job.saving if version)
    job.saving.clear()
