"""Snapshots and versions: when all blocks are in a file it counts."""

from __future__ import annotations

import logging

from computron.parameter_service.master.events import Finish, Finished, Remove
from computron.parameter_service.master.records import SNAPSHOTS_KEPT, SnapshotSaved, VersionSaved
from computron.parameter_service.master.state import State
from computron.parameter_service.wire.messages import Kept, Saved

log = logging.getLogger(__name__)


class Files:
    def __init__(self, state: State) -> None:
        self._state = state

    def saved(self, message: Saved, now: float) -> None:
        job = self._state.jobs.get(message.job)
        if job is None or any(saved.path == message.path for saved in job.book.snapshots):
            return
        job.saw(message.step, now)
        key = message.version, message.step, message.path
        blocks = job.saving.setdefault(key, set())
        blocks.update(message.blocks)
        if len(blocks) == len(job.layout.blocks):
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
        if job is None:
            return
        if event.version:
            self._state.write(VersionSaved(event.job, event.version, event.step, event.path, event.at))
            log.info("version_complete job=%s version=%s step=%d", event.job, event.version, event.step)
            return
        job.trouble = ""
        older = job.book.snapshots[: max(0, len(job.book.snapshots) + 1 - SNAPSHOTS_KEPT)]
        self._state.write(SnapshotSaved(event.job, event.step, event.path))
        for key in [key for key in job.saving if not key[0] and key[1] < event.step]:
            del job.saving[key]  # what is missing in an older one will not come any more
        self._state.orders.extend(Remove(saved.path) for saved in older)
        for name in sorted(job.holders):
            self._state.tell(name, Kept(job.name, event.step))
