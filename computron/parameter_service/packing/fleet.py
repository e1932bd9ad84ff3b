"""Which aggregator has which blocks. A fleet is a value: every change makes another one, so that packers can try."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from computron.parameter_service.packing.loads import Capacity, JobLoad


@dataclass(frozen=True, slots=True)
class Held:
    """What one aggregator has of one job: blocks, seconds a step, bytes, bytes a step."""

    blocks: frozenset[int]
    cpu: float
    memory: int
    network: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each block of an arriving job goes. opened: aggregators to start first."""

    places: Mapping[int, str]
    opened: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Move:
    job: str
    block: int
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks that move; opened: aggregators to start first. alone: jobs that from now on share with nobody."""

    moves: tuple[Move, ...] = ()
    opened: tuple[str, ...] = ()
    alone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fleet:
    """servers: of each aggregator, what it holds of each job. owners: of each job, the aggregator of each block.

    alone: jobs that are slower than predicted where they share: nothing is placed beside them, and they are not moved.
    homes: of each job, its aggregators. paces: of each job, seconds of its iteration where it is now, if nobody else
    were there. Both follow from the rest.
    """

    capacity: Capacity = field(default_factory=Capacity)
    jobs: Mapping[str, JobLoad] = field(default_factory=dict)
    servers: Mapping[str, Mapping[str, Held]] = field(default_factory=dict)
    owners: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()
    homes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    paces: Mapping[str, float] = field(default_factory=dict)

    def spread(self, job: str) -> dict[str, Held]:
        """What each of the job's aggregators holds of it."""
        return {name: self.servers[name][job] for name in self.homes[job]}

    def memory(self, server: str) -> int:
        return sum(held.memory for held in self.servers[server].values())

    def network(self, server: str) -> float:
        """Bytes/s if each job is as fast as with aggregators of its own."""
        return math.fsum(held.network / self.jobs[job].period for job, held in self.servers[server].items())

    def utilisation(self, server: str) -> float:
        """Share of its compute thread that is busy if no job loses anything; above 1, they cannot all be so fast."""
        return math.fsum(held.cpu / self.paces[job] for job, held in self.servers[server].items())

    def is_reserved(self, server: str) -> bool:
        """Is one of its jobs to be alone?"""
        return not self.alone.isdisjoint(self.servers[server])

    def fits(self, server: str) -> bool:
        """Memory and network only."""
        return self.memory(server) <= self.capacity.memory and self.network(server) <= self.capacity.network

    def fresh(self, count: int) -> tuple[str, ...]:
        """Names that no aggregator has yet, the same for the same fleet."""
        names: list[str] = []
        number = 1
        while len(names) < count:
            name = f"aggregator-{number}"
            if name not in self.servers:
                names.append(name)
            number += 1
        return tuple(names)

    def opened(self, names: Iterable[str]) -> Fleet:
        """Raises ValueError if one is open."""
        servers = dict(self.servers)
        for name in names:
            if name in servers:
                raise ValueError(f"aggregator {name} is open")
            servers[name] = {}
        return replace(self, servers=servers)

    def closed(self, name: str) -> Fleet:
        """Raises ValueError if it holds anything."""
        if self.servers[name]:
            raise ValueError(f"aggregator {name} holds blocks of {', '.join(sorted(self.servers[name]))}")
        return replace(self, servers={other: held for other, held in self.servers.items() if other != name})

    def with_job(self, job: JobLoad, plan: Plan) -> Fleet:
        """Raises ValueError if the plan does not name each of its blocks once, or the job is there already."""
        if job.job in self.jobs:
            raise ValueError(f"job {job.job} has its place")
        if set(plan.places) != {load.block for load in job.blocks}:
            raise ValueError(f"the plan does not place the blocks of job {job.job}")
        return self.opened(plan.opened).placing(job, plan.places)

    def placing(self, job: JobLoad, places: Mapping[int, str]) -> Fleet:
        """These blocks of the job go, or are, there; its others stay. A job may be there in part while it is packed."""
        owners = {**self.owners.get(job.job, {}), **places}
        homes = tuple(sorted(set(owners.values())))
        servers = dict(self.servers)
        for name in {*homes, *self.homes.get(job.job, ())}:
            rest = {other: held for other, held in servers[name].items() if other != job.job}
            mine = [load for load in job.blocks if owners.get(load.block) == name]
            if mine:
                rest[job.job] = Held(
                    frozenset(load.block for load in mine),
                    math.fsum(load.cpu for load in mine),
                    sum(load.memory for load in mine),
                    sum(load.network for load in mine),
                )
            servers[name] = rest
        pace = job.compute + max(servers[name][job.job].cpu for name in homes)
        return replace(
            self,
            jobs={**self.jobs, job.job: job},
            servers=servers,
            owners={**self.owners, job.job: owners},
            homes={**self.homes, job.job: homes},
            paces={**self.paces, job.job: pace},
        )

    def changed(self, change: Change) -> Fleet:
        """Raises ValueError if a block is not where it is said to come from."""
        fleet = replace(self.opened(change.opened), alone=self.alone | change.alone)
        for move in change.moves:
            if fleet.owners[move.job][move.block] != move.source:
                raise ValueError(f"{move}: the block is with {fleet.owners[move.job][move.block]}")
            fleet = fleet.placing(fleet.jobs[move.job], {move.block: move.target})
        return fleet

    def without(self, job: str) -> Fleet:
        servers = dict(self.servers)
        for name in self.homes[job]:
            servers[name] = {other: held for other, held in servers[name].items() if other != job}
        return replace(
            self,
            servers=servers,
            jobs={other: load for other, load in self.jobs.items() if other != job},
            owners={other: places for other, places in self.owners.items() if other != job},
            homes={other: names for other, names in self.homes.items() if other != job},
            paces={other: pace for other, pace in self.paces.items() if other != job},
            alone=self.alone - {job},
        )
