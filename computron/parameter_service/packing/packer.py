"""What every packer does, and what all do alike: drain, shrink and put right what turned out slower than predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar

from computron.parameter_service.packing.fleet import Change, Fleet, Move, Plan
from computron.parameter_service.packing.loads import BlockLoad, DoesNotFit, JobLoad, Limits

LOSS_ERROR = 1e-9  # losses closer than this are the same


class Packer(ABC):
    """Pure: the same fleet gives the same answer. A packer keeps nothing from call to call."""

    name: ClassVar[str]

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    @abstractmethod
    def losses(self, fleet: Fleet) -> dict[str, float]:
        """Predicted, of each job: 1 - D / d. Negative where a job is faster than with aggregators of its own."""

    @abstractmethod
    def _settle(
        self, fleet: Fleet, job: JobLoad, blocks: Collection[int], among: Collection[str], share: float
    ) -> dict[int, str] | None:
        """Where these blocks of the job may go among these aggregators; None if they cannot.

        Its other blocks, if it is in the fleet already, stay. share: of what a loss may be.
        """

    def place(self, fleet: Fleet, job: JobLoad) -> Plan:
        """Where an arriving job's blocks go: onto open aggregators if they can carry them, and as few new ones as do.

        Raises DoesNotFit if a block is too large for an aggregator of its own.
        """
        blocks = [load.block for load in job.blocks]
        for load in job.blocks:
            self._check(fleet, job, load)
        for count in range(len(blocks) + 1):
            opened = fleet.fresh(count)
            trial = fleet.opened(opened)
            places = self._settle(trial, job, blocks, self._shared(trial), 1.0)
            if places is not None:
                return Plan(places, tuple(name for name in opened if name in places.values()))
        raise DoesNotFit(f"job {job.job} does not fit with an aggregator for each of its blocks: split them")

    def drain(self, fleet: Fleet, server: str) -> Change | None:
        """Moves that leave an aggregator empty; None if the others cannot carry what it holds."""
        return self._drain(fleet, server, 1.0)

    def shrink(self, fleet: Fleet) -> str | None:
        """The aggregator to drain and stop: the least loaded one whose work the others can carry with ease."""
        name = min(fleet.servers, key=lambda name: (fleet.utilisation(name), name), default=None)
        return None if name is None or self.drain_with_ease(fleet, name) is None else name

    def drain_with_ease(self, fleet: Fleet, server: str) -> Change | None:
        """As `drain`, but losses stay so far below their limits that the next arrival does not undo it."""
        return self._drain(fleet, server, self.limits.shrink)

    def rebalance(self, fleet: Fleet, observed: Mapping[str, float]) -> Change:
        """Few moves for jobs whose observed losses violate their limits, the worst first.

        1. It is alone on its aggregators: nothing can be done here.
        2. The prediction says so too (loads have changed), also after the moves so far: it goes where it is within its
           limit, with ease, or to other aggregators that are opened.
        3. It does not: the assignment is reverted. The job goes to aggregators of its own.

        Raises DoesNotFit if a block has become too large for an aggregator of its own.
        """
        change = Change()
        trial = fleet
        predicted = self.losses(fleet)
        worst = sorted(
            (job for job in observed if self._violates(fleet, job, observed[job])), key=lambda j: (-observed[j], j)
        )
        for name in worst:
            if len({move.job for move in change.moves}) == self.limits.jobs_at_once:
                break
            if name in trial.alone or not self._shares(trial, name):
                continue
            foreseen = self._foresees(fleet, name, predicted[name])
            if foreseen and not self._foresees(trial, name, self.losses(trial)[name]):
                continue
            step = (self._elsewhere(trial, name) if foreseen else None) or self._alone(trial, name)
            change = Change(change.moves + step.moves, change.opened + step.opened, change.alone | step.alone)
            trial = trial.changed(step)
        return change

    def _check(self, fleet: Fleet, job: JobLoad, load: BlockLoad) -> None:
        capacity = fleet.capacity
        needs = (
            ("bytes of memory", load.memory, capacity.memory),
            ("bytes/s of network", load.network / job.period, capacity.network),
            ("s of compute thread in an iteration", load.cpu, job.period),
        )
        for what, need, there in needs:
            if need > there:
                raise DoesNotFit(f"job {job.job}: block {load.block} needs {need:g} {what} of {there:g}: split it")

    def _violates(self, fleet: Fleet, job: str, loss: float) -> bool:
        return loss > self.limits.loss_of(fleet.jobs[job]) * (1.0 + self.limits.tolerance) + LOSS_ERROR

    def _foresees(self, fleet: Fleet, job: str, predicted: float) -> bool:
        """Is it no wonder that the job loses too much where it is?"""
        return self._violates(fleet, job, predicted)

    @staticmethod
    def _shares(fleet: Fleet, job: str) -> bool:
        return any(len(fleet.servers[server]) > 1 for server in fleet.homes[job])

    @staticmethod
    def _shared(fleet: Fleet) -> list[str]:
        return sorted(name for name in fleet.servers if not fleet.is_reserved(name))

    def _drain(self, fleet: Fleet, server: str, share: float) -> Change | None:
        if fleet.is_reserved(server):
            return None
        trial = fleet
        moves: list[Move] = []
        among = [name for name in self._shared(fleet) if name != server]
        for name, held in sorted(fleet.servers[server].items(), key=lambda item: (-item[1].cpu, item[0])):
            places = self._settle(trial, fleet.jobs[name], sorted(held.blocks), among, share)
            if places is None:
                return None
            moves += (Move(name, block, server, target) for block, target in sorted(places.items()))
            trial = trial.placing(fleet.jobs[name], places)
        return Change(tuple(moves))

    def _elsewhere(self, fleet: Fleet, name: str) -> Change | None:
        job = fleet.jobs[name]
        rest = fleet.without(name)
        now = set(fleet.homes[name])
        blocks = [load.block for load in job.blocks]
        among = [server for server in self._shared(rest) if server not in now]
        for count in range(len(blocks) + 1):
            opened = fleet.fresh(count)
            places = self._settle(rest.opened(opened), job, blocks, [*among, *opened], self.limits.shrink)
            if places is not None:
                return self._towards(fleet, name, places, tuple(new for new in opened if new in places.values()))
        return None

    def _alone(self, fleet: Fleet, name: str) -> Change:
        job = fleet.jobs[name]
        blocks = [load.block for load in job.blocks]
        rest = fleet.without(name)
        empty = [server for server in sorted(rest.servers) if not rest.servers[server]]
        for count in range(max(0, job.servers - len(empty)), len(blocks) + 1):
            opened = fleet.fresh(count)
            places = self._settle(rest.opened(opened), job, blocks, [*empty, *opened], 1.0)
            if places is not None:
                used = tuple(server for server in opened if server in places.values())
                return replace(self._towards(fleet, name, places, used), alone=frozenset({name}))
        raise DoesNotFit(f"job {name} does not fit with an aggregator for each of its blocks: split them")

    @staticmethod
    def _towards(fleet: Fleet, name: str, places: Mapping[int, str], opened: tuple[str, ...]) -> Change:
        moves = (Move(name, block, fleet.owners[name][block], target) for block, target in sorted(places.items()))
        return Change(tuple(move for move in moves if move.source != move.target), opened)
