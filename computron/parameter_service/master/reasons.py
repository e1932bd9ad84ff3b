"""What calls for a reconfiguration of a job, and when nobody is there who would want one."""

from __future__ import annotations

import logging

from computron.parameter_service.master.files import newest
from computron.parameter_service.master.findings import is_unfilled
from computron.parameter_service.master.loading import may_load
from computron.parameter_service.master.records import JobUnhosted, MemberGone
from computron.parameter_service.master.state import Change, Job, State, memory_of
from computron.parameter_service.wire.messages import Drop, Keep

log = logging.getLogger(__name__)


def look_for_members(state: State, job: Job, now: float) -> None:
    """Workers that count as gone: both their links are down, or the job stands still without them."""
    limits = state.limits
    for rank, worker in list(job.workers.items()):
        if worker.link is not None:
            continue
        away = now - worker.unlinked
        still = now - max(job.progressed, worker.unlinked)
        if (worker.lost and away >= limits.loss) or still >= limits.absence or rank not in job.book.members:
            del job.workers[rank]
            if rank in job.book.members:
                log.warning("worker_lost job=%s rank=%d", job.name, rank)
                state.write(MemberGone(job.name, rank, worker.lost_for_certain))


def look_for_doubts(state: State, job: Job, now: float) -> None:
    """Aggregators that a member or, for long, the master cannot reach, while the job stands still: they count as lost
    for it. Steps may be long, and a link that broke comes back: a member has to have said so again and again. Those
    that only the master misses are waited for where nothing else has what they have.
    """
    for aggregator, doubt in list(job.doubted.items()):
        if job.progressed > doubt.first or job.change is not None:
            del job.doubted[aggregator]
        elif doubt.last - doubt.first >= state.limits.unreachable:
            del job.doubted[aggregator]
            job.exclude([aggregator], now + state.limits.exclusion)
    if job.change is None and job.linked and newest(job):
        known = [state.aggregators[owner] for owner in sorted(set(job.book.owners)) if owner in state.aggregators]
        away = [owner for owner in known if owner.link is None]
        gone = [a.id for a in away if now - max(a.unlinked, job.progressed, job.since) >= state.limits.away]
        job.exclude(gone, now + state.limits.exclusion)


def reason_to_begin(state: State, job: Job, now: float) -> str | None:
    """Why the job is to be reconfigured now, if it is, and can be."""
    members = job.book.members
    reason = _pressing(state, job)
    if reason is None:
        joining = [w for w in job.linked if members.get(w.rank) not in ("", w.incarnation)]
        owners_here = all(state.is_linked(owner) for owner in set(job.book.owners))
        if joining and owners_here and now - max(w.came for w in joining) >= state.limits.join:
            reason = f"rank {', '.join(str(worker.rank) for worker in joining)} joins"
    if reason is None and may_load(job):
        reason = "the workers load a state"
    if reason is None or not enough(job):
        return None
    if job.mismatch_of_log and now - job.since < state.limits.hold:
        return None  # other aggregators that have blocks of it are about to register
    if not any(rank in job.workers for rank in members) and len(job.linked) < job.book.spec.workers:
        return None  # it begins anew, which takes as many workers as it said
    return reason


def enough(job: Job) -> bool:
    """Whether so many workers are there that the job may go on."""
    return len(job.linked) >= max(1, job.book.spec.min_workers)


def may_begin_anew(job: Job, change: Change) -> bool:
    """Whether nothing is lost when a worker brings the parameters once more: nothing lasts, or nobody can have taken a
    step or loaded a state. That needs a complete snapshot of the beginning, unless none can be written, and all blocks.
    """
    spec = job.book.spec
    if spec.optimizer == "sum":
        return True
    if job.step > 0 or job.book.loaded:
        return False
    if job.book.placed is None or job.unbrought:
        return True
    return (spec.snapshot_every > 0 and not job.book.unsaved) or is_unfilled(job, change)


def why_nothing_is_left(job: Job) -> str:
    """Why a job of which blocks are lost cannot go on. The rest of them may be of different steps."""
    every = job.book.spec.snapshot_every
    if every == 0:
        return "and no snapshots are taken of this job: set snapshot_every, and give the service a snapshots folder"
    if job.trouble or job.book.unsaved:
        return f"and no snapshot could be written: {job.trouble or 'see the log of the master before this one'}"
    return f"and no snapshot was complete yet: one is taken every {every} steps; take them more often to lose less"


def look_for_idleness(state: State, job: Job, now: float) -> None:
    """The last step of a job that nobody works on is saved, in case nobody comes back. One that nobody has worked on
    for long gives its memory back, if it can be taken up from a snapshot, or nothing of it lasts.
    """
    if job.workers:
        job.idle_since = job.kept_by = None
        return
    if job.idle_since is None:
        job.idle_since = now
    if job.change is not None or not (newest(job) or job.book.spec.optimizer == "sum"):
        return
    alive = state.aggregators.keys()
    if alive & job.unfenced.keys() or not all(map(state.is_linked, alive & job.holders)):
        return  # somebody may still train it with an aggregator that cannot be told
    over = job.idle_since + state.limits.idle
    if now >= over and job.kept_by is not None and job.kept_by < over:
        job.kept_by = None  # it could not be saved then: once more
    if _is_kept(state, job, now) and now >= over and job.book.owners:
        snapshot = newest(job)
        if snapshot is not None and snapshot.step < job.step:
            log.warning("steps_dropped job=%s step=%d: they could not be saved", job.name, job.step)
        unhost(state, job)


def _is_kept(state: State, job: Job, now: float) -> bool:
    """Whether the last step is in a snapshot, which is asked for, or cannot be brought there in time. A step that is
    half taken cannot.
    """
    placed = job.book.placed
    snapshot = newest(job)
    if placed is None or snapshot is None or snapshot.step >= job.step:
        return True
    if job.kept_by is None:
        size = sum(memory_of(job, block) for block in range(len(job.layout.blocks)))
        job.kept_by = now + state.limits.hold + size / state.limits.read_rate
        for name in sorted(set(job.book.owners)):
            state.tell(name, Keep(job.name, placed.epoch))
    return now >= job.kept_by


def unhost(state: State, job: Job) -> None:
    """Give its memory back. Aggregators that cannot be told now are when they come back."""
    for name in sorted(job.holders):
        state.tell(name, Drop(job.name))
    state.write(JobUnhosted(job.name))
    job.hosts.clear()


def _pressing(state: State, job: Job) -> str | None:
    """Why the job cannot go on as it is."""
    book = job.book
    assert book.placed is not None
    if book.placed.epoch != book.epoch or job.mismatch:
        return "the master was away"
    for owner in sorted({*book.owners, *book.moving.values()}):
        if owner not in state.aggregators:
            return f"{owner or 'an aggregator'} died"
        if owner in job.excluded:
            return f"{owner} cannot be reached"
    if job.broken:
        return job.broken
    if book.gone:
        return f"rank {', '.join(map(str, sorted(book.gone)))} left"
    return None
