"""Snapshots and versions: a file counts when all that belongs to it is there."""

from __future__ import annotations

import logging
from pathlib import Path

from computron.parameter_service.master.events import Discard, Finish, Finished, NotFinished, Prune
from computron.parameter_service.master.records import SavingFailed, SnapshotSaved, VersionSaved
from computron.parameter_service.master.state import Change, Job, State, Unfinished
from computron.parameter_service.versions.names import begun_of
from computron.parameter_service.wire.messages import NO_FOLDER, Failed, Kept, Saved, Unpublished

log = logging.getLogger(__name__)


class Files:
    def __init__(self, state: State) -> None:
        self._state = state

    def saved(self, message: Saved, now: float) -> None:
        job = self._state.jobs.get(message.job)
        if job is None or message.path in job.book.files or not _counts(job, message) or _is_late(job, message):
            return
        job.saw(message.step, now)
        key = message.version, message.step, message.path, message.history
        if (message.version, message.step, message.history) in job.unpublished_files:
            self._state.orders.append(Discard(message.path, message.history, message.step))  # it came too late for that
            return
        there = job.saving.setdefault(key, Unfinished())
        there.since = now
        there.blocks.update(message.blocks)
        there.extras.update(message.extras)
        extras = len(job.book.spec.extras) if message.version else 0
        if len(there.blocks) == len(job.layout.blocks) and len(there.extras) == extras:
            del job.saving[key]
            self._state.orders.append(Finish(job.name, *key, len(job.layout.blocks) + extras))

    def not_saved(self, job: Job, aggregator: str, message: Failed) -> None:
        """Blocks of a snapshot could not be written. What an older epoch lacks is saved again in the next."""
        reason = f"{aggregator}: {message.message}"
        if message.epoch != job.book.epoch:
            log.info("old_file_failed job=%s reason=%s", job.name, reason)
            return
        if message.message != NO_FOLDER:
            log.error("snapshot_failed job=%s reason=%s", job.name, reason)
        elif not job.without_folder:
            job.without_folder = True
            log.warning("nothing_is_saved job=%s: if an aggregator dies the job ends; %s", job.name, reason)
        self._do_without(job, message.step, reason)

    def not_published(self, job: Job, aggregator: str, message: Failed) -> None:
        """What is said of an older history is of a version that nobody waits for, or of a deleted job of this name."""
        reason = f"{aggregator}: {message.message}"
        if message.history < job.book.history:
            log.info("old_file_failed job=%s reason=%s", job.name, reason)
            return
        _unpublish(self._state, job, (message.version, message.step, message.path, message.history), reason)

    def not_finished(self, event: NotFinished) -> None:
        job = self._state.jobs.get(event.job)
        if job is None or not _counts(job, event):
            log.info("old_file_failed job=%s reason=%s", event.job, event.message)
        elif event.version:
            _unpublish(self._state, job, (event.version, event.step, event.path, event.history), event.message)
        else:
            log.error("snapshot_failed job=%s reason=%s", job.name, event.message)
            self._do_without(job, event.step, event.message)

    def look_for_extras(self, now: float) -> None:
        """Versions for which there will never be all that is not trained."""
        for job in self._state.jobs.values():
            count = len(job.book.spec.extras)
            for file, there in list(job.saving.items()):
                version, step, *_ = file
                lacking = version and len(there.extras) < count and step <= job.extras_until
                if lacking and now - there.since >= self._state.limits.away:
                    reason = "the worker that had what is not trained left, or died, before it was written"
                    _unpublish(self._state, job, file, reason)

    def _do_without(self, job: Job, step: int, reason: str) -> None:
        """A snapshot of this step, or of one before, did not come about, wherever it failed: none of the aggregators is
        to wait for it.
        """
        job.trouble, job.trouble_step = reason, max(job.trouble_step, step)
        if not job.book.unsaved:
            self._state.write(SavingFailed(job.name))
        for name in sorted(job.holders):
            self._state.tell(name, Kept(job.name, None))

    def finished(self, event: Finished) -> None:
        job = self._state.jobs.get(event.job)
        if job is None or event.path in job.book.files or not _counts(job, event):
            return
        if event.version:
            self._state.write(VersionSaved(event.job, event.version, event.step, event.path, event.at))
            job.unpublished = ""
            log.info("version_complete job=%s version=%s step=%d", event.job, event.version, event.step)
            return
        self._state.write(SnapshotSaved(event.job, event.step, event.path))
        for key in [key for key in job.saving if not key[0] and key[1] < event.step]:
            del job.saving[key]  # what is missing in an older one will not come any more
        self._state.orders.append(Prune(event.path, tuple(saved.path for saved in job.book.snapshots)))
        if job.trouble and event.step < job.trouble_step:
            return  # later ones have failed: perhaps no other is tried before the limit that this one sets
        job.trouble, job.trouble_step = "", 0
        for name in sorted(job.holders):
            self._state.tell(name, Kept(job.name, event.step))


def _counts(job: Job, file: Saved | Finished | NotFinished) -> bool:
    """Whether a file is of a state that the job still comes from. A version that is complete is what it is."""
    if file.version:
        if isinstance(file, Finished):
            return True
        return file.history >= job.book.history and not _is_before_load(job, file.history)
    begun = begun_of(Path(file.path))
    return begun is None or (job.book.counts(*begun) and not _is_before_load(job, begun[1]))


def _is_before_load(job: Job, epoch: int) -> bool:
    """Whether another state is being loaded since that epoch."""
    placed = job.book.placed
    return placed is not None and job.book.loads > job.book.loaded and epoch < placed.epoch


def _is_late(job: Job, message: Saved) -> bool:
    """Whether a newer snapshot is complete, so that nobody needs this one any more, and it may have been removed."""
    begun = begun_of(Path(message.path))
    known = [begun_of(Path(saved.path)) for saved in job.book.counted]
    return begun is not None and any(later is not None and begun < later for later in known)


def newest(job: Job) -> SnapshotSaved | None:
    """The complete snapshot of the last step; of two of the same step, that of the later epoch."""
    return max(job.book.counted, key=lambda saved: begun_of(Path(saved.path)) or (saved.step, 0), default=None)


def first_limit(job: Job, change: Change) -> int | None:
    """`Kept.step` with which the change's epoch begins."""
    every = job.book.spec.snapshot_every
    if change.loads:
        return change.applied - every  # no step before there is a snapshot of what was loaded
    if job.trouble:
        return None
    snapshot = newest(job)
    return snapshot.step if snapshot is not None else -every


def note_extras(job: Job, change: Change) -> None:
    """What is not trained comes from the lowest rank: if that one has gone, the rest of it will not come."""
    before = job.book.members
    if before and before[min(before)] not in ("", change.members.get(min(before))):
        job.extras_until = change.applied + 1


def _unpublish(state: State, job: Job, file: tuple[str, int, str, int], reason: str) -> None:
    """The workers hear of it once, however many blocks it fails for. The job's view says so until another version is
    complete.
    """
    version, step, path, history = file
    if (version, step, history) in job.unpublished_files:
        return
    log.error("version_failed job=%s version=%s step=%d reason=%s", job.name, version, step, reason)
    job.unpublished = reason
    job.unpublished_files.add((version, step, history))
    alike = {key for key in job.saving if (key[0], key[1], key[3]) == (version, step, history)}
    for key in alike | ({file} if path else set()):
        job.saving.pop(key, None)
        state.orders.append(Discard(key[2], history, step))
    for worker in job.linked:
        state.send(worker.link, Unpublished(job.name, version, reason))


def discard_unfinished(state: State, job: Job, back_to: int = -1) -> None:
    """What is being written will not be complete: the job goes on from another step, or is no more. Workers hear of
    versions of the step that it goes back to, or of one before: those are not published again with their step.
    """
    for file in list(job.saving):
        if file[0] and file[1] <= back_to:
            _unpublish(state, job, file, f"it was not complete when the job went back to step {back_to}")
    state.orders.extend(Discard(path, history) for version, _, path, history in job.saving if version)
    job.saving.clear()
    job.unpublished_files.clear()
