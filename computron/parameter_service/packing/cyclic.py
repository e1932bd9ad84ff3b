"""Cyclic execution (AutoPS, arXiv 2204.03211): the published packer, with its slips mended.

An aggregator's cycle C is the longest iteration on it. A shorter one runs floor(C / D) times in a cycle and stretches
to d = C / floor(C / D). Mended here, where the heuristic leaves it open or lets it slip:
- A job's blocks are on several aggregators: its iteration is the longest of its stretches, and an aggregator's cycle
  is the longest of these real iterations, until nothing changes any more.
- The limit is checked for every job whose iteration changes anywhere, the arriving one included, and again whenever a
  block joins another aggregator.
- The work of a block counts as often as its job runs in the cycle, by the job's own iteration.
- Memory and network count. A block that fits nowhere opens an aggregator; one that no aggregator could ever take is an
  error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from computron.parameter_service.packing.fleet import Fleet
from computron.parameter_service.packing.loads import BlockLoad, JobLoad
from computron.parameter_service.packing.packer import LOSS_ERROR, Packer

RUN_ERROR = 1e-9  # so much less than a whole run still is one: periods are sums of floats


class Cyclic(Packer):
    """Block by block, the largest first, best fit: the smallest free time of a cycle that is enough."""

    name = "cyclic"

    def losses(self, fleet: Fleet) -> dict[str, float]:
        periods = _stretched(fleet, fleet.servers)
        full = {server: max(1.0, _busy(fleet, server, periods)) for server in fleet.servers}
        stretches = {name: max(full[server] for server in fleet.homes[name]) for name in fleet.jobs}
        return {
            name: 1.0 - load.period / (periods[name] * stretches[name]) for name, load in sorted(fleet.jobs.items())
        }

    def _settle(
        self, fleet: Fleet, job: JobLoad, blocks: Collection[int], among: Collection[str], share: float
    ) -> dict[int, str] | None:
        before = _stretched(fleet, fleet.servers)
        trial = fleet.without(job.job) if job.job in fleet.jobs else fleet
        settled = {block: server for block, server in fleet.owners.get(job.job, {}).items() if block not in blocks}
        if settled:
            trial = trial.placing(job, settled)
        places: dict[int, str] = {}
        free: dict[str, float] = {}
        joined: tuple[str, ...] | None = None
        loads = (load for load in job.blocks if load.block in blocks)
        for load in sorted(loads, key=lambda load: (-load.cpu, load.block)):
            homes = trial.homes.get(job.job, ())
            if homes != joined:
                joined = homes
                free = self._free(trial, job, load, before, among, share)
            fitting = [name for name in free if self._has_room(trial, name, job, load, free[name])]
            if not fitting:
                return None
            server = min(fitting, key=lambda name: (free[name], name))
            places[load.block] = server
            trial = trial.placing(job, {load.block: server})
            free[server] -= load.cpu
        return places

    def _free(
        self,
        fleet: Fleet,
        job: JobLoad,
        load: BlockLoad,
        before: Mapping[str, float],
        among: Iterable[str],
        share: float,
    ) -> dict[str, float]:
        """Of each aggregator that the job may join, or is on: seconds of work that it can take from one of its runs.

        Which of its blocks would be the first there makes no difference: `load` is tried.
        """
        free = {}
        for server in sorted(among):
            trial = fleet.placing(job, {load.block: server})
            periods = _stretched(trial, (server,))
            if self._allowed(trial, job, periods, before, share):
                run = periods[job.job]
                free[server] = run * (1.0 - _busy(fleet, server, periods))
        return free

    def _allowed(
        self, fleet: Fleet, job: JobLoad, periods: Mapping[str, float], before: Mapping[str, float], share: float
    ) -> bool:
        """Are all iterations within their limits, or no longer than before?"""
        for name, period in periods.items():
            load = fleet.jobs[name]
            most = share * self.limits.loss_of(load) + LOSS_ERROR
            if 1.0 - load.period / period > most and (name == job.job or period > before[name] * (1.0 + LOSS_ERROR)):
                return False
        return True

    @staticmethod
    def _has_room(fleet: Fleet, server: str, job: JobLoad, load: BlockLoad, free: float) -> bool:
        return (
            load.cpu <= free
            and fleet.memory(server) + load.memory <= fleet.capacity.memory
            and fleet.network(server) + load.network / job.period <= fleet.capacity.network
        )


def _busy(fleet: Fleet, server: str, periods: Mapping[str, float]) -> float:
    """Share of a cycle."""
    return math.fsum(held.cpu / periods[name] for name, held in fleet.servers[server].items())


def _stretched(fleet: Fleet, start: Iterable[str]) -> dict[str, float]:
    """Seconds of the iteration of each job on these aggregators, or linked with them through others.

    It ends: iterations only become longer, none longer than the longest, and each is a cycle by a whole number of runs.
    """
    periods: dict[str, float] = {}
    pending = dict.fromkeys(sorted(start))
    linked = list(pending)
    for server in linked:  # grows meanwhile
        for name in sorted(fleet.servers[server]):
            if name not in periods:
                periods[name] = fleet.jobs[name].period
                linked += (home for home in fleet.homes[name] if home not in pending)
                pending.update(dict.fromkeys(fleet.homes[name]))
    while pending:
        server = next(iter(pending))
        del pending[server]
        names = sorted(fleet.servers[server])
        cycle = max((periods[name] for name in names), default=0.0)
        for name in names:
            period = cycle / int(cycle / fleet.jobs[name].period + RUN_ERROR)
            if period > periods[name] * (1.0 + LOSS_ERROR):
                periods[name] = period
                pending.update(dict.fromkeys(fleet.homes[name]))
    return periods
