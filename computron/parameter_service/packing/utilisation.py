"""Pack by utilisation: aggregators stay below a share of their time, and queueing says what each job loses by it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from computron.parameter_service.packing.fleet import Fleet
from computron.parameter_service.packing.loads import JobLoad, Limits
from computron.parameter_service.packing.packer import LOSS_ERROR, Packer
from computron.parameter_service.packing.queueing import Burst, Wait, waits


class Utilisation(Packer):
    """A job's blocks are cut in one to `limits.pieces` even pieces, each on an aggregator; more only if they must be.

    Pieces are worked on at the same time and wait less, so that a job may be faster than alone. Of all places where
    every job that notices stays within its limit and every shared aggregator within its utilisation, that one is
    taken at which they together lose least.
    """

    name = "utilisation"

    def shrink(self, fleet: Fleet) -> str | None:
        most = self.limits.utilisation
        busy = sum(min(most, fleet.utilisation(name)) for name in fleet.servers)
        return super().shrink(fleet) if busy <= most * (len(fleet.servers) - 1) else None

    def losses(self, fleet: Fleet) -> dict[str, float]:
        forecast = _Forecast(fleet, self.limits)
        return {name: forecast.loss(name) for name in sorted(fleet.jobs)}

    def _settle(
        self, fleet: Fleet, job: JobLoad, blocks: Collection[int], among: Collection[str], share: float
    ) -> dict[int, str] | None:
        best: tuple[float, int, dict[int, str]] | None = None
        before = _Forecast(fleet, self.limits)
        cpu = sum(load.cpu for load in job.blocks if load.block in blocks)
        most = min(len(blocks), len(among))
        wanted = max(1, self.limits.pieces, job.servers)
        for count in range(1, most + 1):
            if best is not None and (count > wanted or cpu / count < self.limits.shortest_piece):
                break
            pieces = _even(job, blocks, count)
            for servers in self._choices(fleet, job, pieces, among):
                places = {block: server for piece, server in zip(pieces, servers, strict=True) for block in piece}
                cost = self._cost(fleet.placing(job, places), job, before, share)
                if cost is not None and (best is None or (cost, count) < best[:2]):
                    best = cost, count, places
        return None if best is None else best[2]

    def _choices(
        self, fleet: Fleet, job: JobLoad, pieces: Sequence[Sequence[int]], among: Collection[str]
    ) -> Iterator[Sequence[str]]:
        """Aggregators for the pieces: windows over those with room, from the busiest to the idlest. Larger pieces go to
        idler ones.
        """
        loads = {load.block: load.cpu for load in job.blocks}
        smallest = sum(loads[block] for block in pieces[-1]) / job.period
        used = {name: fleet.utilisation(name) for name in among}
        room = [name for name in among if not fleet.servers[name] or used[name] + smallest <= self.limits.utilisation]
        room.sort(key=lambda name: (used[name], name))
        for start in range(len(room) - len(pieces), -1, -1):
            yield room[start : start + len(pieces)]

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
        for name in (job.job, *sorted(noticing - {job.job})):
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
        self._waits: dict[str, dict[str, Wait]] = {}
        self._losses: dict[str, float] = {}

    def loss(self, name: str) -> float:
        if name not in self._losses:
            job = self.fleet.jobs[name]
            work = drifting = 0.0
            for server, held in self.fleet.spread(name).items():
                wait = self._on(server)[name]
                work = max(work, held.cpu + wait.in_step)
                drifting += wait.drifting
            self._losses[name] = 1.0 - job.period / (job.compute + work + drifting)
        return self._losses[name]

    def _on(self, server: str) -> dict[str, Wait]:
        if self._before is not None and server not in self._changed:
            return self._before._on(server)
        if server not in self._waits:
            held = self.fleet.servers[server]
            bursts = [self._burst(name, part.cpu) for name, part in held.items()]
            self._waits[server] = dict(zip(held, waits(bursts, self._limits.chunk, self._limits.jitter), strict=True))
        return self._waits[server]

    def _burst(self, name: str, cpu: float) -> Burst:
        job = self.fleet.jobs[name]
        return Burst(self.fleet.paces[name], cpu, cpu + self._limits.loss_of(job) * job.period)


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
