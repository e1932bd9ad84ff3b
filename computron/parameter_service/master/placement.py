"""Where blocks go that have no owner."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from computron.parameter_service.master.loads import fleet_of, load_of, room_of
from computron.parameter_service.master.state import Aggregator, Job, State
from computron.parameter_service.packing import DoesNotFit, Packer

log = logging.getLogger(__name__)


class Placer(Protocol):
    def place(self, state: State, job: Job, usable: Sequence[Aggregator]) -> list[str] | None:
        """The owner of each block of the job, among `usable`; None if they do not fit there."""


def memory_used(state: State, *, without: Job | None = None) -> dict[str, int]:
    """Bytes that blocks of all other jobs take at each aggregator, those that are on their way there included."""
    used: dict[str, int] = dict.fromkeys(state.aggregators, 0)
    for job in state.jobs.values():
        if job is without:
            continue
        room = room_of(state, job)
        for block, place in enumerate(job.places):
            for name in {place, job.book.owners[block] if block in job.book.moving else place}:
                used[name] = used.get(name, 0) + room[block]
    return used


class LeastMemory:
    """Every block goes where most memory is free: for tests, and where nothing is known about loads."""

    def place(self, state: State, job: Job, usable: Sequence[Aggregator]) -> list[str] | None:
        used, room = memory_used(state, without=job), room_of(state, job)
        owners = []
        for size in room:
            place = _roomiest(usable, used, size)
            if place is None:
                return None
            used[place] += size
            owners.append(place)
        return owners


class Packed:
    """As a packer says. Where it wants to open aggregators, the job begins on those that are there, and is moved when
    the others have come: nobody waits for a process to start.
    """

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._otherwise = LeastMemory()

    def place(self, state: State, job: Job, usable: Sequence[Aggregator]) -> list[str] | None:
        if not usable:
            return None
        names = [aggregator.id for aggregator in usable]
        try:
            plan = self._packer.place(fleet_of(state, names, without=job), load_of(state, job))
        except DoesNotFit as error:
            log.warning("does_not_fit job=%s reason=%s", job.name, error)
            return self._otherwise.place(state, job, usable)
        if plan.opened:
            return self._otherwise.place(state, job, usable)
        return [plan.places[block] for block in range(len(job.layout.blocks))]


def _roomiest(usable: Iterable[Aggregator], used: dict[str, int], size: int) -> str | None:
    room = [(aggregator.memory - used.get(aggregator.id, 0), aggregator.id) for aggregator in usable]
    fitting = [(-free, name) for free, name in room if free >= size]
    return min(fitting)[1] if fitting else None
