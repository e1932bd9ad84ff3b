"""Jobs that come and go, through a packer: how many aggregators they need, and what they lose."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from computron.parameter_service.packing import Capacity, Change, Fleet, JobLoad, Limits, Packer
from computron.parameter_service.simulation.server import SimulatedJob, simulate
from computron.parameter_service.simulation.trace import TracedJob

SAMPLE_ITERATIONS = 200  # of the slowest job, in one simulated moment


class ServerPerJob(Packer):
    """The baseline: every job has its aggregators for itself."""

    name = "server-per-job"

    def losses(self, fleet: Fleet) -> dict[str, float]:
        return dict.fromkeys(fleet.jobs, 0.0)

    def shrink(self, fleet: Fleet) -> None:
        return None

    def _settle(
        self, fleet: Fleet, job: JobLoad, blocks: Collection[int], among: Collection[str], share: float
    ) -> dict[int, str] | None:
        empty = [name for name in among if not fleet.servers[name]]
        if len(empty) < job.servers:
            return None
        return {block: empty[place % job.servers] for place, block in enumerate(sorted(blocks))}


@dataclass(frozen=True, slots=True)
class Moment:
    """A fleet at a time, with what its packer predicts that each job loses."""

    time: float
    fleet: Fleet
    predicted: Mapping[str, float]


@dataclass(slots=True)
class Replay:
    """What came of a trace. All sums are over its time, in seconds.

    reserved: aggregators, one core each. cpu: seconds of work. used: the work that the jobs would give if none lost
    anything: less than this many cores cannot do it. rounded: the same with whole aggregators at every moment.
    losses: of each job over its life. worst: the largest predicted for any job at any moment. moves: blocks.
    timeline: time, aggregators, jobs; after each change.
    """

    packer: str
    reserved: float = 0.0
    cpu: float = 0.0
    used: float = 0.0
    rounded: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    worst: float = 0.0
    moves: int = 0
    drained: int = 0
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


@dataclass(slots=True)
class _Active:
    job: TracedJob
    began: float
    left: float
    iteration: float


class _Player:
    def __init__(self, packer: Packer, capacity: Capacity, keep_every: int) -> None:
        self.packer = packer
        self.fleet = Fleet(capacity)
        self.active: dict[str, _Active] = {}
        self.now = 0.0
        self.keep_every = keep_every
        self.replay = Replay(packer.name)

    def play(self, jobs: Sequence[TracedJob]) -> Replay:
        coming = sorted(jobs, key=lambda job: (job.arrival, job.load.job), reverse=True)
        while coming or self.active:
            ending = min(
                self.active.values(), key=lambda job: (job.left * job.iteration, job.job.load.job), default=None
            )
            end = math.inf if ending is None else self.now + ending.left * ending.iteration
            if coming and coming[-1].arrival <= end:
                self._advance(coming[-1].arrival)
                self._arrive(coming.pop())
            elif ending is not None:
                self._advance(end)
                self._end(ending)
            self._changed()
        return self.replay

    def _advance(self, until: float) -> None:
        seconds = until - self.now
        self.now = until
        busy = math.fsum(job.job.load.cpu / job.job.load.period for job in self.active.values())
        self.replay.reserved += len(self.fleet.servers) * seconds
        self.replay.used += busy * seconds
        self.replay.rounded += math.ceil(busy) * seconds
        for job in self.active.values():
            steps = seconds / job.iteration
            job.left -= steps
            self.replay.cpu += steps * job.job.load.cpu

    def _arrive(self, job: TracedJob) -> None:
        self.fleet = self.fleet.with_job(job.load, self.packer.place(self.fleet, job.load))
        self.active[job.load.job] = _Active(job, self.now, job.steps, job.load.period)

    def _end(self, ended: _Active) -> None:
        load = ended.job.load
        del self.active[load.job]
        homes = self.fleet.homes[load.job]
        self.fleet = self.fleet.without(load.job)
        self._close(homes)
        self._put_right()
        while (server := self.packer.shrink(self.fleet)) is not None:
            change = self.packer.drain_with_ease(self.fleet, server) or Change()
            self.fleet = self.fleet.changed(change).closed(server)
            self.replay.moves += len(change.moves)
            self.replay.drained += 1
        lived = self.now - ended.began
        self.replay.losses[load.job] = 1.0 - ended.job.steps * load.period / lived if lived > 0.0 else 0.0

    def _put_right(self) -> None:
        """Where a job left, those that stay may lose more than before: to a packer that goes by the longest one."""
        while (change := self.packer.rebalance(self.fleet, self.packer.losses(self.fleet))).moves:
            sources = {move.source for move in change.moves}
            self.fleet = self.fleet.changed(change)
            self.replay.moves += len(change.moves)
            self._close(sources)

    def _close(self, servers: Iterable[str]) -> None:
        for server in sorted(servers):
            if not self.fleet.servers[server]:
                self.fleet = self.fleet.closed(server)

    def _changed(self) -> None:
        losses = self.packer.losses(self.fleet)
        for name, job in self.active.items():
            job.iteration = job.job.load.period / (1.0 - losses[name])
        self.replay.worst = max([self.replay.worst, *losses.values()])
        self.replay.timeline.append((self.now, len(self.fleet.servers), len(self.active)))
        if self.keep_every and self.active and len(self.replay.timeline) % self.keep_every == 0:
            self.replay.moments.append(Moment(self.now, self.fleet, losses))


def replay(
    jobs: Sequence[TracedJob], packer: Packer, *, capacity: Capacity | None = None, keep_every: int = 0
) -> Replay:
    """All jobs arrive when the trace says and go on, as slow as predicted, until their steps are done.

    keep_every: keep every so many-th moment between two changes for `simulated_losses`; 0 keeps none.
    """
    return _Player(packer, capacity or Capacity(), keep_every).play(jobs)


def simulated_losses(fleet: Fleet, limits: Limits, *, jitter: float = 0.0, seed: int = 0) -> dict[str, float]:
    """What the jobs of a fleet lose on simulated aggregators. jitter: as for `simulate`."""
    jobs = [
        SimulatedJob(
            name,
            load.compute,
            {server: held.cpu for server, held in fleet.spread(name).items()},
            limits.loss_of(load) * load.period,
        )
        for name, load in sorted(fleet.jobs.items())
    ]
    seconds = SAMPLE_ITERATIONS * max(load.period for load in fleet.jobs.values())
    iterations = simulate(jobs, seconds=seconds, chunk=limits.chunk, jitter=jitter, seed=seed)
    return {name: 1.0 - load.period / iterations[name].mean for name, load in fleet.jobs.items()}
