"""Workers come, report, and go."""

from __future__ import annotations

import hmac
import logging

from computron.errors import BadRequest
from computron.parameter_service.layout import Layout
from computron.parameter_service.master.differences import difference_of
from computron.parameter_service.master.reconfiguration import Reconfiguration
from computron.parameter_service.master.records import JobBook, JobCreated, MemberGone
from computron.parameter_service.master.state import Doubt, Job, State, Worker, memory_of
from computron.parameter_service.specs import layout_of
from computron.parameter_service.versions.names import check_job
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.messages import (
    Enlist,
    Leave,
    Load,
    Loaded,
    Progress,
    Unreachable,
    WorkerLost,
)

log = logging.getLogger(__name__)

LONGEST_ITERATION = 1e9  # seconds


class Workers:
    def __init__(self, state: State, reconfiguration: Reconfiguration) -> None:
        self._state = state
        self._reconfiguration = reconfiguration

    def enlist(self, link: int, message: Enlist, now: float) -> None:
        job = self._admitted(link, message, now)
        if job is None:
            return
        rank = message.rank if message.rank is not None else _free_rank(job, message.incarnation)
        worker = job.workers.get(rank)
        if worker is not None and worker.incarnation not in ("", message.incarnation):
            self._replaced(job, worker)
            worker = None
        if worker is None:
            worker = job.workers[rank] = Worker(rank, message.incarnation, message.machine, link, now)
            known = job.book.members.get(rank)
            if known not in (None, "", message.incarnation):
                self._gone(job, rank, certain=True)
            log.info("worker_enlisted job=%s rank=%d", job.name, rank)
        else:
            if worker.link is not None and worker.link != link:
                self._state.links.pop(worker.link, None)
            worker.incarnation, worker.machine = message.incarnation, message.machine
            worker.link = link
            worker.lives()
        self._state.links[link] = (job.name, rank)
        placed = job.book.placed
        if placed is not None and message.epoch == placed.epoch:
            job.saw(message.step, now)
        self._reconfiguration.placement(job, worker)

    def left(self, link: int, message: Leave, now: float) -> None:
        job = self._state.jobs.get(message.job)
        worker = self._speaker(link, message.job, message.rank)
        if job is None or worker is None:
            return
        log.info("worker_left job=%s rank=%d step=%d", job.name, worker.rank, message.step)
        if job.change is None:
            job.saw(message.step, now)
        self._state.links.pop(link, None)
        del job.workers[worker.rank]
        self._gone(job, worker.rank, certain=True)

    def closed(self, job: Job, rank: int, link: int, now: float) -> None:
        worker = job.workers.get(rank)
        if worker is not None and worker.link == link:
            worker.link, worker.unlinked = None, now

    def lost(self, aggregator: str, message: WorkerLost) -> None:
        """Its connection to this aggregator has ended. Sharing memory, they shared a machine: then it is dead."""
        job = self._state.jobs.get(message.job)
        worker = job.workers.get(message.rank) if job is not None else None
        if worker is None or worker.incarnation not in ("", message.incarnation):
            return
        worker.lost = True
        known = self._state.aggregators.get(aggregator)
        if known is not None and known.address is not None:
            worker.lost_for_certain |= known.address.machine == worker.machine

    def progress(self, link: int, message: Progress, now: float) -> None:
        job = self._state.jobs.get(message.job)
        worker = self._speaker(link, message.job, message.rank)
        if job is None or worker is None or message.epoch != job.book.epoch:
            return
        if message.step > worker.step and _are_times(message.compute, message.wait):
            worker.took(message.compute, message.wait)
        worker.step = message.step
        worker.lives()
        job.saw(message.step, now)
        if job.change is None:
            follower = worker.rank, worker.incarnation
            job.fenced.update(name for name, members in job.unfenced.items() if follower in members)

    def load(self, link: int, message: Load) -> None:
        job = self._state.jobs.get(message.job)
        worker = self._speaker(link, message.job, message.rank)
        if job is None or worker is None:
            return
        worker.load = message
        if message.number <= job.book.loaded:  # it was not told
            self._state.send(link, Loaded(job.name, job.book.loaded))

    def unreachable(self, link: int, message: Unreachable, now: float) -> None:
        job = self._state.jobs.get(message.job)
        worker = self._speaker(link, message.job, message.rank)
        if job is None or worker is None or message.epoch != job.book.epoch or job.change is not None:
            return
        name = message.address.aggregator
        known = self._state.aggregators.get(name)
        if name not in job.holders or known is None or known.address != message.address:
            return  # it has nothing of the job, or is another one than the worker knew by that name
        log.warning(
            "unreachable job=%s rank=%d aggregator=%s reason=%s",
            job.name, worker.rank, name, message.reason,
        )  # fmt: skip
        if self._state.is_linked(name):
            doubt = job.doubted.get(name)
            if doubt is None or now - doubt.last > self._state.limits.repeated:
                doubt = job.doubted[name] = Doubt(now, now)
            doubt.last = now
        else:
            job.exclude([name], now + self._state.limits.exclusion)

    def _speaker(self, link: int, job: str, rank: int) -> Worker | None:
        """Whom the link belongs to, if it speaks for itself."""
        if self._state.links.get(link) != (job, rank):
            return None
        return self._state.jobs[job].workers.get(rank)

    def _admitted(self, link: int, message: Enlist, now: float) -> Job | None:
        spec = message.spec
        job = self._state.jobs.get(spec.job)
        try:
            layout = layout_of(spec) if job is None else job.layout
        except ValueError as error:
            return self._deny(link, spec.job, refusals.BAD_MESSAGE, str(error))
        try:
            if job is None:
                check_job(spec.job)
        except BadRequest as error:
            return self._deny(link, spec.job, refusals.BAD_MESSAGE, error.message)
        if spec.workers < 1 or (message.rank or 0) < 0:
            return self._deny(link, spec.job, refusals.BAD_MESSAGE, "a job has workers, and its ranks count from 0")
        if job is None:
            return self._create(link, message, layout, now)
        if not hmac.compare_digest(job.book.token.encode(), message.token.encode()):
            return self._deny(
                link, spec.job, refusals.BAD_TOKEN, f"this is not the token of job {spec.job}; {_ways_out(spec.job)}"
            )
        difference = difference_of(job.book.spec, spec)
        if difference is not None:
            text = f"job {spec.job} exists already and differs: {difference}; {_another(spec.job)}"
            return self._deny(link, spec.job, refusals.DIFFERENT_JOB, text)
        if job.failed is not None:
            return self._deny(link, spec.job, refusals.FAILED, f"job {spec.job} has failed: {job.failed}")
        return job

    def _create(self, link: int, message: Enlist, layout: Layout, now: float) -> Job | None:
        spec = message.spec
        job = Job(JobBook(spec, message.token), layout, now)
        limit = self._state.book.quotas.get(spec.job, self._state.limits.max_job_memory)
        size = sum(memory_of(job, block) for block in range(len(layout.blocks)))
        if limit is not None and size > limit:
            text = f"job {spec.job} needs {size} bytes with its optimizer's state, and a job may have {limit}"
            return self._deny(link, spec.job, refusals.QUOTA, text)
        book = self._state.book
        epoch = max(book.dropped.get(spec.job, 0), self._state.epochs.get(spec.job, 0))
        self._state.write(JobCreated(spec, message.token, epoch))
        job.book = book.jobs[spec.job]
        self._state.jobs[spec.job] = job
        log.info("job_created job=%s blocks=%d bytes=%d workers=%d", spec.job, len(layout.blocks), size, spec.workers)
        return job

    def _deny(self, link: int, job: str, code: str, text: str) -> Job | None:
        log.warning("denied job=%s code=%s", job, code)
        self._state.dismiss(link, job, code, text)
        return None

    def _replaced(self, job: Job, worker: Worker) -> None:
        self._state.dismiss(worker.link, job.name, refusals.FAILED, "another process has taken this rank")
        del job.workers[worker.rank]
        self._gone(job, worker.rank, certain=True)

    def _gone(self, job: Job, rank: int, *, certain: bool) -> None:
        if rank in job.book.members and not job.book.gone.get(rank, False):
            self._state.write(MemberGone(job.name, rank, certain))


def _are_times(compute: float, wait: float) -> bool:
    """Whether seconds of an iteration can be these; others would go into all that is decided from them."""
    return 0 < compute < LONGEST_ITERATION and 0 <= wait < LONGEST_ITERATION


def _ways_out(job: str) -> str:
    return f"all its workers have the same COMPUTRON_JOB_TOKEN, that of the first; or {_another(job)}"


def _another(job: str) -> str:
    """What to do where a job is in the way."""
    return f"choose another name (COMPUTRON_JOB), or delete the job: computron parameter-service delete {job}"


def _free_rank(job: Job, incarnation: str) -> int:
    """The same again for a worker that had one."""
    known = {worker.incarnation: rank for rank, worker in job.workers.items()}
    known |= {member: rank for rank, member in job.book.members.items() if rank not in job.workers}
    if incarnation in known:
        return known[incarnation]
    taken = set(job.workers) | (set(job.book.members) - set(job.book.gone))
    return next(rank for rank in range(len(taken) + 1) if rank not in taken)
