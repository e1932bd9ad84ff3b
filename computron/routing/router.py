"""A router: told what happens, it says where requests go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from computron.routing.fleet import Fleet, GroupSize, GroupView, ModelFacts
from computron.routing.tuning import Tuning


class NoGroupError(Exception):
    """No group is up that the model fits."""


class Routing(Protocol):
    """How a group is chosen. May remember its own choices; the fleet is only read."""

    def choose(self, model: ModelFacts, groups: Sequence[GroupView], fleet: Fleet, now: float) -> int:
        """The number of one of `groups`: those that are up and large enough, at least one, in order of number."""


class Router:
    """Every request that `route` has sent must end by `ended`, or by `lost` of its group.

    Reports of what is resident may be late or missing: the router then takes a model to be where it said last, and
    what it has sent since to be on its way there.
    """

    def __init__(
        self,
        routing: Routing,
        models: Iterable[ModelFacts],
        groups: Sequence[GroupSize],
        tuning: Tuning | None = None,
    ) -> None:
        self.fleet = Fleet(models, groups, tuning or Tuning())
        self._routing = routing
        self._smallest = min(group.memory for group in groups)
        self._all_up = True

    def route(self, name: str, now: float) -> int:
        """The group for a request to this model, which counts as sent there. Raises NoGroupError, or KeyError."""
        fleet = self.fleet
        model = fleet.models[name]
        groups = fleet.groups
        if not self._all_up or model.bytes > self._smallest:
            groups = [group for group in groups if group.up and group.memory >= model.bytes]
            if not groups:
                raise NoGroupError(f"no group is up that {name!r} with its {model.bytes} bytes fits")
        group = self._routing.choose(model, groups, fleet, now) if len(groups) > 1 else groups[0].number
        fleet.sent(group, name, now)
        return group

    def ended(self, group: int, name: str, now: float, seconds: float | None = None) -> None:
        """A request has left the group. seconds: of the device, in the steps that it was part of, if known."""
        self.fleet.ended(group, name, now, seconds)

    def reported(self, group: int, name: str, resident: int, now: float) -> None:
        """The group says that so many bytes of the model are on its device."""
        self.fleet.reported(group, name, resident, now)

    def lost(self, group: int) -> None:
        """The group takes no requests; those that it had must be routed anew."""
        self.fleet.lost(group)
        self._all_up = False

    def joined(self, group: int) -> None:
        """The group takes requests again, with empty devices."""
        self.fleet.joined(group)
        self._all_up = all(view.up for view in self.fleet.groups)
