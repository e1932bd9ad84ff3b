"""What a router knows of its groups: their size, what it sent them, what they said is on their devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from computron.routing.tuning import Tuning


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """bytes: parameters on one node of a group. batch: how many requests one step takes."""

    name: str
    bytes: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class GroupSize:
    """One node's device memory in bytes, and its link in bytes a second."""

    memory: int
    bandwidth: float


class GroupView:
    """One group as the router sees it. Everything but its size is kept by the `Fleet`.

    outstanding: requests sent there that have not ended. work: seconds that the device needs for them.
    awaited: bytes that the models of these requests lack there. free: bytes of device memory without parameters.
    resident: bytes of each model, as last reported; the model that was used longest ago is first.
    """

    __slots__ = (
        "awaited",
        "bandwidth",
        "free",
        "memory",
        "number",
        "outstanding",
        "queued",
        "resident",
        "shares",
        "up",
        "used",
        "work",
    )

    def __init__(self, number: int, size: GroupSize) -> None:
        self.number = number
        self.memory = size.memory
        self.bandwidth = size.bandwidth
        self.up = True
        self.forget()

    def forget(self) -> None:
        self.outstanding = 0
        self.work = 0.0
        self.awaited = 0
        self.free = self.memory
        self.queued: dict[str, int] = {}
        self.shares: dict[str, float] = {}  # of `work`, by model
        self.resident: dict[str, int] = {}
        self.used: dict[str, float] = {}  # when a request of a resident model last came or ended; same order

    def lacks(self, model: ModelFacts) -> int:
        """Bytes that the model lacks there."""
        return max(0, model.bytes - self.resident.get(model.name, 0))

    def oldest_use(self) -> float | None:
        """When the resident model that was used longest ago was used."""
        return next(iter(self.used.values()), None)


class Fleet:
    """All groups. Each change costs the same however many models there are."""

    def __init__(self, models: Iterable[ModelFacts], groups: Sequence[GroupSize], tuning: Tuning) -> None:
        self.groups = [GroupView(number, size) for number, size in enumerate(groups)]
        self.models = {model.name: model for model in models}
        self.tuning = tuning
        self._seconds: dict[str, float] = {}
        self._mean = tuning.first_guess  # of all models

    def seconds(self, model: str) -> float:
        """Of the device for one step of the model, as learnt; the mean of all models before its first."""
        return self._seconds.get(model, self._mean)

    def sent(self, group: int, name: str, now: float) -> None:
        view = self.groups[group]
        model = self.models[name]
        count = view.queued.get(name, 0)
        if not count:
            view.awaited += view.lacks(model)
        view.queued[name] = count + 1
        view.outstanding += 1
        self._weigh(view, model, count + 1)
        self._touch(view, name, now)

    def ended(self, group: int, name: str, now: float, seconds: float | None) -> None:
        """A request was answered, or rejected. seconds: of steps that it was part of, if that is known.

        Says nothing of a request that the loss of its group has ended.
        """
        if seconds is not None:
            self._learn(name, seconds)
        view = self.groups[group]
        count = view.queued.get(name, 0)
        if not count:
            return
        model = self.models[name]
        view.outstanding -= 1
        if count > 1:
            view.queued[name] = count - 1
        else:
            del view.queued[name]
            view.awaited -= view.lacks(model)
        self._weigh(view, model, count - 1)
        self._touch(view, name, now)

    def reported(self, group: int, name: str, resident: int, now: float) -> None:
        """So many bytes of the model are on the group's device. The last report counts; of a lost group, none."""
        view = self.groups[group]
        if not view.up:
            return
        model = self.models[name]
        before = view.resident.get(name, 0)
        if name in view.queued:
            view.awaited += max(0, model.bytes - resident) - view.lacks(model)
        view.free += before - resident
        if resident:
            view.resident[name] = resident
            view.used.setdefault(name, now)
        elif before:
            del view.resident[name], view.used[name]

    def lost(self, group: int) -> None:
        """The group takes no requests, and those that it had have ended. Its devices will be empty."""
        view = self.groups[group]
        view.up = False
        view.forget()

    def joined(self, group: int) -> None:
        self.groups[group].up = True

    def _weigh(self, view: GroupView, model: ModelFacts, count: int) -> None:
        share = -(-count // model.batch) * self.seconds(model.name)
        view.work += share - view.shares.get(model.name, 0.0)
        if count:
            view.shares[model.name] = share
        else:
            view.shares.pop(model.name, None)
        if not view.outstanding:
            view.work = 0.0

    def _touch(self, view: GroupView, name: str, now: float) -> None:
        if name in view.used:
            del view.used[name]
            view.used[name] = now

    def _learn(self, name: str, seconds: float) -> None:
        smoothing = self.tuning.smoothing
        known = self._seconds.get(name)
        if not self._seconds:
            self._mean = seconds
        self._seconds[name] = seconds if known is None else known + smoothing * (seconds - known)
        self._mean += smoothing * (seconds - self._mean)
