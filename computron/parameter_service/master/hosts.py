"""Aggregators come, report, and go."""

from __future__ import annotations

import logging
from collections import deque

from computron.parameter_service.master.events import Close
from computron.parameter_service.master.reconfiguration import Reconfiguration
from computron.parameter_service.master.records import (
    AggregatorGone,
    AggregatorKnown,
    AggregatorStarted,
    EpochBegun,
    JobCreated,
    Placed,
)
from computron.parameter_service.master.state import Aggregator, Job, State, Worker
from computron.parameter_service.specs import layout_of
from computron.parameter_service.wire.messages import Address, HostedJob, Register, Registered, Stop, Usage

log = logging.getLogger(__name__)

STOPPED_KEPT = 1000  # addresses of aggregators that were drained; each process has one of its own


class Hosts:
    def __init__(self, state: State, reconfiguration: Reconfiguration) -> None:
        self._state = state
        self._reconfiguration = reconfiguration
        self._stopped: deque[Address] = deque(maxlen=STOPPED_KEPT)

    def started(self, name: str, pid: int, began: float, now: float) -> None:
        self._state.write(AggregatorStarted(name, pid, began))
        self._state.aggregators[name] = Aggregator(name, pid, now)

    def register(self, link: int, message: Register, now: float) -> None:
        name = message.address.aggregator
        known = self._state.aggregators.get(name)
        if known is not None and known.pid not in (0, message.pid):  # 0: only its name is known
            if known.link is not None:
                log.warning("name_taken aggregator=%s pid=%d", name, message.pid)
                self._state.orders.append(Close(link))
                return
            self.gone(name, now)
            known = None
        if known is None:
            known = self._state.aggregators[name] = Aggregator(name, message.pid, now)
            known.draining = known.stopping = message.address in self._stopped
        elif known.link is not None:
            self._state.links.pop(known.link, None)
        known.link, known.pid, known.address, known.memory = link, message.pid, message.address, message.memory
        self._state.links[link] = name
        record = AggregatorKnown(message.address, message.pid)
        if self._state.book.known.get(name) != record:
            self._state.write(record)
        log.info("aggregator_registered aggregator=%s jobs=%d", name, len(message.jobs))
        drop = [hosted.spec.job for hosted in message.jobs if not self._expected(name, hosted, now)]
        self._state.send(link, Registered(tuple(drop)))
        if known.stopping:
            self._state.send(link, Stop())
        for job in self._state.jobs.values():
            job.excluded.pop(name, None)
            if name in job.unfenced:
                job.fenced.add(name)
            if name in job.holders:
                self._compare(job, name, message.jobs)
                self._reconfiguration.aggregator_back(job, name, now)
                for worker in job.linked:
                    self._reconfiguration.placement(job, worker)

    def closed(self, name: str, link: int, now: float) -> None:
        known = self._state.aggregators.get(name)
        if known is not None and known.link == link:
            known.link, known.unlinked = None, now
            if known.stopping and name not in self._state.book.started:
                if known.address is not None:
                    self._stopped.append(known.address)  # should it come again, it has missed its order
                self.gone(name, now)  # one of this machine is gone when its process is
                return
            if not known.stopping:
                log.warning("aggregator_unlinked aggregator=%s", name)

    def gone(self, name: str, now: float) -> None:
        """It is dead: what it had is nowhere now."""
        known = self._state.aggregators.pop(name, None)
        if known is None:
            return
        if known.stopping:
            log.info("aggregator_stopped aggregator=%s: it was drained", name)
        else:
            log.warning("aggregator_gone aggregator=%s", name)
        if known.link is not None:
            self._state.links.pop(known.link, None)
        self._state.write(AggregatorGone(name))
        for job in self._state.jobs.values():
            if name in job.holders:
                self._reconfiguration.aggregator_gone(job, name, now)
                job.hosts.discard(name)

    def usage(self, name: str, message: Usage, now: float) -> None:
        known = self._state.aggregators[name]
        known.usage = message
        known.cpu += message.cpu
        for used in message.jobs:
            job = self._state.jobs.get(used.job)
            if job is None:
                continue
            job.cpu.update(used.cpu_per_block)
            job.cpu_total += used.cpu
            job.late += used.late
            if used.steps:
                job.progressed = now
                job.note_behind(name, used.behind / used.steps)

    def _expected(self, name: str, hosted: HostedJob, now: float) -> bool:
        """Whether the aggregator shall keep the job. A job that the master has forgotten is taken up again."""
        job = self._state.jobs.get(hosted.spec.job)
        if job is None:
            if hosted.spec.job in self._state.book.dropped:
                return False
            try:
                job = self._take_up(hosted, now)
            except ValueError as error:
                log.error("job_not_taken_up job=%s: %s", hosted.spec.job, error)
                return False
        if not job.mismatch_of_log:
            return name in job.holders
        assert job.book.placed is not None
        owners = list(job.book.placed.owners)
        for block in hosted.blocks:
            owners[block.block] = name
        epoch = max(job.book.epoch, hosted.epoch)
        members = tuple((rank, "") for rank in hosted.members)
        self._state.write(EpochBegun(job.name, epoch))
        self._state.write(Placed(job.name, job.book.placed.epoch, members, tuple(owners), 0))
        job.hosts.add(name)
        return True

    def _take_up(self, hosted: HostedJob, now: float) -> Job:
        """Raises ValueError if there can be no such job."""
        spec = hosted.spec
        layout = layout_of(spec)
        log.warning("job_taken_up job=%s: the log does not have it", spec.job)
        self._state.write(JobCreated(spec, hosted.token))
        job = self._state.jobs[spec.job] = Job(self._state.book.jobs[spec.job], layout, now)
        job.mismatch_of_log = True
        members = tuple((rank, "") for rank in hosted.members)
        self._state.write(Placed(spec.job, 0, members, ("",) * len(layout.blocks), 0))
        for rank in hosted.members:
            job.workers[rank] = Worker(rank, "", "", None, now, unlinked=now)
        return job

    def _compare(self, job: Job, name: str, jobs: tuple[HostedJob, ...]) -> None:
        """Whether it has what the book says; what else came to pass while there was no link is found out by asking."""
        placed = job.book.placed
        if placed is None:
            return
        hosted = next((hosted for hosted in jobs if hosted.spec.job == job.name), None)
        there = {block.block for block in hosted.blocks} if hosted is not None else set()
        ours = {block for block, owner in enumerate(placed.owners) if owner == name}
        if hosted is not None:
            job.hosts.add(name)
        on_the_way = {block for block, to in job.book.moving.items() if name in (to, placed.owners[block])}
        stuck = hosted is not None and hosted.held and job.change is None  # it has not heard that it may go on
        if there != ours or on_the_way or stuck or (hosted is not None and hosted.epoch != placed.epoch):
            job.mismatch = True
