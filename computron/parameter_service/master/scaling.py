"""How many aggregators there are, and which jobs share them: looked at again every few seconds.

1. A job loses more than its limit, and did so already in reports of which none counts any more: its blocks are moved,
   to aggregators that are started first if there are none. If it should not have lost that much it shares with nobody
   for a while, the longer the more often that comes about.
2. Nothing of the kind for a while, and the others can carry the work of the least loaded aggregator: it is drained.
   Where somebody else starts the aggregators, one fewer is wanted, and whoever stops one has it drained first.
3. An aggregator that is drained and empty is stopped.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from computron.parameter_service.master.events import Start
from computron.parameter_service.master.loads import fleet_of, is_measured, observed_loss, unexplained_wait
from computron.parameter_service.master.moves import Moves
from computron.parameter_service.master.placement import LeastMemory
from computron.parameter_service.master.records import AggregatorGone
from computron.parameter_service.master.state import REPORTS, Aggregator, Phase, State
from computron.parameter_service.packing import DoesNotFit, Fleet, Packer
from computron.parameter_service.packing import Move as PackedMove
from computron.parameter_service.wire.messages import Stop

log = logging.getLogger(__name__)

LONGEST_DELAY = 30.0  # seconds until an aggregator that dies at once is started again
ALONE = 10.0  # times the hysteresis: for how long a job that was slower than predicted shares with nobody, at first
CALM = 10.0  # times the hysteresis: for how long no aggregator is given up after a job lost too much


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """minimum, maximum: how many aggregators. interval: seconds between two looks. hysteresis: seconds for which one
    must have been dispensable. starts: whether the master starts them itself.
    """

    minimum: int = 1
    maximum: int = 1
    interval: float = 5.0
    hysteresis: float = 30.0
    starts: bool = False


class Scaling:
    """wanted: how many aggregators there should be."""

    def __init__(self, state: State, moves: Moves, packer: Packer, settings: ScalingSettings, now: float) -> None:
        self.settings = settings
        self._state = state
        self._moves = moves
        self._packer = packer
        self._due = now + settings.interval
        self._needed = 0  # for the work there is, whatever the minimum
        self._dispensable_since: float | None = None
        self._calm_from = now
        self._starting: dict[str, float] = {}
        self._start_after = now
        self._delay = 0.0
        self._company: dict[str, object] = {}  # where each job was at the last look, and with which others
        self._losing: dict[str, dict[int, int]] = {}  # each rank's reports when its job was first seen to lose
        self.predicted: dict[str, float] = {}

    @property
    def wanted(self) -> int:
        return min(self.settings.maximum, max(self._minimum, self._needed))

    @property
    def _minimum(self) -> int:
        return self.settings.minimum if self._state.book.minimum is None else self._state.book.minimum

    def recall(self) -> None:
        """As many as the log knows were wanted before."""
        self._needed = len(self._state.book.started)

    def started(self, name: str) -> None:
        self._starting.pop(name, None)

    def exited(self, name: str, now: float) -> None:
        """Begin anew with one that has died, soon; later each time if it dies at once."""
        began = self._starting.pop(name, None)
        known = self._state.aggregators.get(name)
        young = began is not None or (known is not None and known.address is None)
        self._delay = min(LONGEST_DELAY, max(1.0, 2 * self._delay)) if young else 0.0
        self._start_after = now + self._delay

    def advance(self, now: float) -> None:
        self._forget(now)
        self._stop_drained(now)
        if now >= self._due:
            self._due = now + self.settings.interval
            self._evaluate(now)
        self._look_for_placeless()
        self._start(now)

    def _look_for_placeless(self) -> None:
        """One more for jobs that fit nowhere, when all that are wanted are there."""
        placeless = any(
            job.change is not None and job.change.phase is Phase.PLACING for job in self._state.jobs.values()
        )
        linked = sum(known.link is not None for known in self._staying())
        if placeless and linked >= self.wanted < self.settings.maximum:
            self._needed = self.wanted + 1
            log.info("scale_out wanted=%d", self.wanted)

    def _start(self, now: float) -> None:
        if not self.settings.starts or now < self._start_after:
            return
        there = [known for known in self._staying() if not self._is_missing(known, now)]
        while len(there) + len(self._starting) < self.wanted:
            name = self._fresh()
            self._starting[name] = now
            self._state.orders.append(Start(name))

    def _is_missing(self, known: Aggregator, now: float) -> bool:
        """Its process is there, but was not heard for long: it hangs."""
        return known.address is not None and known.link is None and now - known.unlinked >= self._state.limits.away

    def _fresh(self) -> str:
        """A name that no log and no aggregator has."""
        taken = self._state.aggregators.keys() | self._starting.keys()
        number = 1
        while f"aggregator-{number}" in taken or any(
            f"aggregator-{number}" in job.holders for job in self._state.jobs.values()
        ):
            number += 1
        return f"aggregator-{number}"

    def _staying(self) -> list[Aggregator]:
        return [known for known in self._state.aggregators.values() if not known.draining and not known.stopping]

    def _evaluate(self, now: float) -> None:
        usable = [known.id for known in self._staying() if known.link is not None]
        if not usable:
            return
        self._state.alone = {name: until for name, until in self._state.alone.items() if now < until}
        fleet = fleet_of(self._state, usable)
        self._watch(fleet, self._unsettled())
        fleet = fleet_of(self._state, usable)
        self.predicted = self._packer.losses(fleet)
        observed = self._observed(fleet)
        try:
            change = self._packer.rebalance(fleet, observed)
        except DoesNotFit as error:
            log.warning("does_not_fit reason=%s", error)
            return
        if change.moves or change.opened:
            self._dispensable_since = None
            self._calm_from = now + CALM * self.settings.hysteresis
            self._carry_out(fleet, change.moves, change.opened, change.alone, now)
        else:
            self._look_for_dispensable(fleet, now)

    def _unsettled(self) -> set[str]:
        """Aggregators that blocks leave or come to: what jobs there lose says nothing of where they will be."""
        moving = [job for job in self._state.jobs.values() if job.book.moving and job.change is None]
        return {name for job in moving for name in job.holders}

    def _watch(self, fleet: Fleet, unsettled: set[str]) -> None:
        """A job's times count anew where its aggregators or its company have changed, or are about to."""
        company: dict[str, object] = {}
        for name, homes in fleet.homes.items():
            job = self._state.jobs[name]
            beside = frozenset(other for home in homes for other in fleet.servers[home])
            company[name] = fleet.owners[name], beside
            if self._company.get(name) != company[name] or not unsettled.isdisjoint(homes):
                job.behind.clear()
                for worker in job.workers.values():
                    worker.times.clear()
            elif len(beside) == 1 and is_measured(job):
                job.overhead = unexplained_wait(job)
        self._company = company

    def _observed(self, fleet: Fleet) -> dict[str, float]:
        """Losses of the jobs that have been losing more than they may since none of the present reports was there, or
        not at all: one slow moment moves nothing.
        """
        losing = {}
        observed = {}
        for name, load in fleet.jobs.items():
            loss = observed_loss(self._state, self._state.jobs[name])
            if loss is None:
                continue
            if loss <= self._packer.limits.loss_of(load):
                observed[name] = loss
                continue
            before = self._losing.get(name, {})
            reports = {rank: worker.reports for rank, worker in self._state.jobs[name].workers.items()}
            losing[name] = {rank: min(count, before.get(rank, count)) for rank, count in reports.items()}
            if all(count - losing[name][rank] >= REPORTS for rank, count in reports.items()):
                observed[name] = loss
        self._losing = losing
        return observed

    def _carry_out(
        self, fleet: Fleet, moves: Iterable[PackedMove], opened: tuple[str, ...], alone: Iterable[str], now: float
    ) -> None:
        empty = sorted(name for name in fleet.servers if not fleet.servers[name])
        if len(opened) > len(empty):
            before = self.wanted
            self._needed = max(self._needed, len(fleet.servers) + len(opened) - len(empty))
            if self.wanted > before:
                log.info("scale_out wanted=%d", self.wanted)
            return  # moved when they have come
        names = dict(zip(opened, empty, strict=False))
        for name in alone:
            job = self._state.jobs[name]
            self._state.alone[name] = now + ALONE * 2**job.reverted * self.settings.hysteresis
            job.reverted += 1
        self._order(moves, names, now)

    def _look_for_dispensable(self, fleet: Fleet, now: float) -> None:
        spare = len(fleet.servers) > self._minimum and (self.settings.starts or len(fleet.servers) <= self.wanted)
        name = self._packer.shrink(fleet) if spare and now >= self._calm_from else None
        if name is None:
            self._dispensable_since = None
        elif self._dispensable_since is None:
            self._dispensable_since = now
        elif now - self._dispensable_since >= self.settings.hysteresis:
            log.info("scale_in aggregator=%s", name)
            self._dispensable_since = None
            self._needed = len(fleet.servers) - 1
            if self.settings.starts:
                self._state.aggregators[name].draining = True

    def _stop_drained(self, now: float) -> None:
        for known in list(self._state.aggregators.values()):
            if not known.draining or known.stopping or known.link is None:
                continue
            jobs = [job for job in self._state.jobs.values() if known.id in job.holders]
            held = [job for job in jobs if known.id in {*job.book.owners, *job.book.moving.values()}]
            if not held:
                known.stopping = True
                self._state.tell(known.id, Stop())
                for job in jobs:
                    job.hosts.discard(known.id)
                continue
            for job in held:
                if job.change is None and not job.book.moving:
                    self._empty(known, now)
                    break

    def _empty(self, known: Aggregator, now: float) -> None:
        """Order what it has elsewhere, as the packer says, or else to wherever there is memory."""
        usable = [other.id for other in self._staying() if other.link is not None]
        change = self._packer.drain(fleet_of(self._state, [*usable, known.id]), known.id) if usable else None
        if change is not None and change.moves:
            self._order(change.moves, {}, now)
            return
        for job in self._state.jobs.values():
            blocks = [block for block, owner in enumerate(job.book.owners) if owner == known.id]
            owners = LeastMemory().place(self._state, job, self._state.usable(job)) if blocks else None
            for block in blocks if owners is not None else ():
                assert owners is not None
                self._moves.order(job, [block], owners[block], now)

    def _order(self, moves: Iterable[PackedMove], names: Mapping[str, str], now: float) -> None:
        """names: of aggregators that the packer calls otherwise."""
        by_target: dict[tuple[str, str], list[int]] = defaultdict(list)
        for move in moves:
            by_target[move.job, names.get(move.target, move.target)].append(move.block)
        for (job, target), blocks in sorted(by_target.items()):
            log.info("move job=%s blocks=%d to=%s", job, len(blocks), target)
            self._moves.order(self._state.jobs[job], blocks, target, now)

    def _forget(self, now: float) -> None:
        """Aggregators of other machines that have gone for good and leave nothing behind."""
        for name, known in list(self._state.aggregators.items()):
            away = known.link is None and now - known.unlinked >= self._state.limits.forget
            needed = name in self._state.book.started or any(name in job.holders for job in self._state.jobs.values())
            if away and not needed:
                del self._state.aggregators[name]
                self._state.write(AggregatorGone(name))
