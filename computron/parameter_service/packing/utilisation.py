"""Pack by utilisation: aggregators stay below a share of their time, and queueing says what each job loses by it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from computron.parameter_service.packing.fleet import Fleet
from computron.parameter_service.packing.loads import Capacity, JobLoad, Limits
from computron.parameter_service.packing.packer import LOSS_ERROR, Packer
from computron.parameter_service.packing.queueing import Burst, Wait, wait_of


class Utilisation(Packer):
    """A job's blocks are cut in one to `limits.pieces` even pieces, each on an aggregator; more only if they must be.

    Pieces are worked on at the same time and wait less, so that a job may be faster than alone. Of the places tried at
    which every job that notices stays within its limit and every shared aggregator within its utilisation, that one is
    taken where they together lose least: more pieces as long as that helps.
    """

    name = "utilisation"

    def shrink(self, fleet: Fleet) -> str | None:
        most = self.limits.utilisation
        busy = sum(min(most, fleet.utilisation(name)) for name in fleet.servers)
        return super().shrink(fleet) if busy <= most * (len(fleet.servers) - 1) else None

    def losses(self, fleet: Fleet) -> dict[str, float]:
        forecast = _Forecast(fleet, self.limits)
        return {name: forecast.loss(name) for name in sorted(fleet.jobs)}

    def _foresees(self, fleet: Fleet, job: str, predicted: float) -> bool:
        return super()._foresees(fleet, job, predicted) or any(
            not self._is_below(fleet, server) for server in fleet.homes[job]
        )

    def _settle(
        self, fleet: Fleet, job: JobLoad, blocks: Collection[int], among: Collection[str], share: float
    ) -> dict[int, str] | None:
        best: tuple[float, dict[int, str]] | None = None
        before = _Forecast(fleet, self.limits)
        cpu = sum(load.cpu for load in job.blocks if load.block in blocks)
        most = min(len(blocks), len(among))
        wanted = max(self.limits.pieces, job.servers, 2 * _needed(fleet.capacity, job, blocks))
        for count in sorted({*range(1, min(wanted, most) + 1), most} - {0}):
            if best is not None and (count > self.limits.pieces or cpu / count < self.limits.shortest_piece):
                break
            pieces = _even(job, blocks, count)
            found = best
            for servers in self._choices(fleet, job, pieces, among, before, share):
                places = {block: server for piece, server in zip(pieces, servers, strict=True) for block in piece}
                cost = self._cost(fleet.placing(job, places), job, before, share)
                if cost is not None and (best is None or cost < best[0] - LOSS_ERROR):
                    best = cost, places
            if best is not None and best is found:
                break
        return None if best is None else best[1]

    def _choices(
        self,
        fleet: Fleet,
        job: JobLoad,
        pieces: Sequence[Sequence[int]],
        among: Collection[str],
        before: _Forecast,
        share: float,
    ) -> Iterator[Sequence[str]]:
        """Aggregators for the pieces: those where one costs least, and the busiest that can have one. Larger pieces go
        to idler ones.
        """
        costs = {}
        for name in sorted(among):
            trial = fleet.placing(job, dict.fromkeys(pieces[-1], name))
            cost = self._cost(trial, job, before, share)
            if cost is not None:
                costs[name] = cost
        used = {name: fleet.utilisation(name) for name in costs}
        cheapest = sorted(costs, key=lambda name: (costs[name], name))[: len(pieces)]
        busiest = sorted(costs, key=lambda name: (-used[name], name))[: len(pieces)]
        for names in (cheapest, busiest):
            if len(names) == len(pieces):
                yield sorted(names, key=lambda name: (used[name], name))

    def _cost(self, fleet: Fleet, job: JobLoad, before: _Forecast, share: float) -> float | None:
        """What all jobs lose by it together; None if it is not allowed. A job without company cannot get more."""
        servers = fleet.homes[job.job]
        noticing: set[str] = set()
        for server in servers:
            if not fleet.fits(server) or (len(fleet.servers[server]) > 1 and not self._is_below(fleet, server)):
                return None
            noticing.update(fleet.servers[server])
        forecast = _Forecast(fleet, self.limits, before, frozenset({*servers, *before.fleet.homes.get(job.job, ())}))
        content = len(noticing) == 1 and len(servers) >= job.servers
        cost = 0.0
        others = sorted(noticing - {job.job}, key=lambda name: (-before.loss(name), name))  # most are refused soon
        for name in (job.job, *others):
            loss = forecast.loss(name)
            more = loss if name == job.job else loss - before.loss(name)
            most = share * self.limits.headroom * self.limits.loss_of(fleet.jobs[name])
            if loss > most + LOSS_ERROR and more > LOSS_ERROR and not content:
                return None
            cost += more
        return cost

    def _is_below(self, fleet: Fleet, server: str) -> bool:
        return fleet.utilisation(server) <= self.limits.utilisation + LOSS_ERROR


class _Forecast:
    """What the jobs of a fleet lose. What no change touches is taken from the forecast before it."""

    def __init__(
        self, fleet: Fleet, limits: Limits, before: _Forecast | None = None, changed: frozenset[str] = frozenset()
    ) -> None:
        self.fleet = fleet
        self._limits = limits
        self._before = before
        self._changed = changed
        self._bursts: dict[str, dict[str, Burst]] = {}
        self._losses: dict[str, float] = {}

    def loss(self, name: str) -> float:
        if name not in self._losses:
            job = self.fleet.jobs[name]
            work = drifting = 0.0
            for server, held in self.fleet.spread(name).items():
                wait = self._wait(server, name)
                work = max(work, held.cpu + wait.in_step)
                drifting += wait.drifting
            full = max(self.fleet.utilisation(server) for server in self.fleet.homes[name])
            iteration = max(job.compute + work + drifting, self.fleet.paces[name] * full)
            self._losses[name] = 1.0 - job.period / iteration
        return self._losses[name]

    def _wait(self, server: str, name: str) -> Wait:
        if self._before is not None and server not in self._changed:
            return self._before._wait(server, name)
        bursts = self._bursts.get(server)
        if bursts is None:
            held = self.fleet.servers[server]
            bursts = self._bursts[server] = {other: self._burst(other, part.cpu) for other, part in held.items()}
        place = list(bursts).index(name)
        return wait_of(place, list(bursts.values()), self._limits.chunk, self._limits.jitter)

    def _burst(self, name: str, cpu: float) -> Burst:
        job = self.fleet.jobs[name]
        return Burst(self.fleet.paces[name], cpu, self._limits.loss_of(job) * job.period)


def _needed(capacity: Capacity, job: JobLoad, blocks: Collection[int]) -> int:
    """So many aggregators these blocks need at least, each with nothing else on it."""
    loads = [load for load in job.blocks if load.block in blocks]
    memory = sum(load.memory for load in loads) / capacity.memory
    network = sum(load.network for load in loads) / job.period / capacity.network
    return math.ceil(max(memory, network))


def _even(job: JobLoad, blocks: Collection[int], count: int) -> list[list[int]]:
    """Cut in pieces of about the same work, none empty, the largest first: the largest block goes where least is."""
    loads = sorted((load for load in job.blocks if load.block in blocks), key=lambda load: (-load.cpu, load.block))
    pieces: list[list[int]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for load in loads:
        least = min(range(count), key=lambda place: (sums[place], len(pieces[place]), place))
        pieces[least].append(load.block)
        sums[least] += load.cpu
    order = sorted(range(count), key=lambda place: (-sums[place], place))
    return [pieces[place] for place in order]
