"""The group that will have answered first, where what a model displaces counts as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

from computron.routing.fleet import Fleet, GroupView, ModelFacts


class Resident:
    """A request goes where its cost in seconds is least. The cost of a group is the sum of:

    1. The wait for the answer: the device has its outstanding work to do, and then the step of this request; if the
       model is not there (all of it), the link has to bring what is awaited there, and then what this one lacks. Both
       go on at once, and a run follows its pages as they come, so that the longer of the two counts. A model with
       requests there already is on its way: it is not brought twice.
    2. Rent, unless the group is the model's home: the model takes memory there that others would have. That costs
       nothing while there is room for it; else a share (`rent`) of what bringing the model takes, and less where what
       would have to leave has been silent for longer: times (youngest age / age), the age being that of the model
       used longest ago in a group, the youngest that of the group under most pressure.

    The home is the group where the model came first, until it has left there; then one that has it still. So a hot
    model is spread when waiting costs more than one more copy, and copies that are needed no more fall silent and
    leave; a cold model comes where it displaces least; and ties go home, else to where most memory is free.
    """

    def __init__(self) -> None:
        self._homes: dict[str, int] = {}

    def choose(self, model: ModelFacts, groups: Sequence[GroupView], fleet: Fleet, now: float) -> int:
        home = self._home(model, fleet)
        step = fleet.seconds(model.name)
        best, least = groups[0], (math.inf, True, 0)
        others = groups
        if home is not None:
            best, least = home, (_wait(home, model, step), False, 0)
            others = [group for group in groups if group.work + step < least[0] and group is not home]
        youngest: float | None = None  # looked for only if it matters
        for group in others:
            cost = _wait(group, model, step)
            if cost > least[0]:
                continue
            age = _age(group, model, now)
            if age is not None:
                if youngest is None:
                    youngest = min(age for age in (_age(group, model, now) for group in groups) if age is not None)
                rent = fleet.tuning.rent * model.bytes / group.bandwidth
                cost += rent * (youngest / age if age > 0.0 else 1.0)
            order = (cost, True, -group.free)
            if order < least:
                best, least = group, order
        if home is None:
            self._homes[model.name] = best.number
        return best.number

    def _home(self, model: ModelFacts, fleet: Fleet) -> GroupView | None:
        """Where the model lives: where its home was, if it is there or on its way there; else where most of it is."""
        number = self._homes.get(model.name)
        if number is not None:
            home = fleet.groups[number]
            if _lives(home, model):
                return home
        others = [group for group in fleet.groups if _lives(group, model)]
        if not others:
            return None
        home = max(others, key=lambda group: group.resident.get(model.name, 0))
        self._homes[model.name] = home.number
        return home


def _lives(group: GroupView, model: ModelFacts) -> bool:
    there = model.name in group.resident or model.name in group.queued
    return there and group.up and group.memory >= model.bytes


def _wait(group: GroupView, model: ModelFacts, step: float) -> float:
    """Seconds until a request to this model would be answered."""
    device = group.work + step
    lacking = group.lacks(model)
    if not lacking:
        return device
    awaited = group.awaited if model.name in group.queued else group.awaited + lacking
    return max(device, awaited / group.bandwidth)


def _age(group: GroupView, model: ModelFacts, now: float) -> float | None:
    """How long what would have to leave for the model has been silent; None if it has room."""
    if group.free >= (group.lacks(model) or model.bytes):
        return None
    oldest = group.oldest_use()
    return None if oldest is None else max(0.0, now - oldest)
