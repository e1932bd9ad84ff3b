"""Groups on one clock, and the router before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from computron.routing import ROUTERS, GroupSize, ModelFacts, Router
from computron.simulation.clock import Clock
from computron.simulation.group import VirtualGroup
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.log import Log
from computron.simulation.workload import Arrival


class Reports:
    """Tells a router of groups what groups tell their observer."""

    def __init__(self, clock: Clock, router: Router, frame_bytes: int) -> None:
        self._clock = clock
        self._router = router
        self._frame_bytes = frame_bytes
        self._pages: Counter[tuple[int, str]] = Counter()

    def pages_came(self, group: int, model: str, pages: int) -> None:
        self._pages[group, model] += pages
        self._router.reported(group, model, self._pages[group, model] * self._frame_bytes, self._clock.now)

    def pages_left(self, group: int, model: str, pages: int) -> None:
        self.pages_came(group, model, -pages)

    def request_ended(self, group: int, model: str, seconds: float | None) -> None:
        self._router.ended(group, model, self._clock.now, seconds)


class Cluster:
    """Takes requests as a group does. Without a router all of them go to the first group."""

    def __init__(self, clock: Clock, groups: Sequence[VirtualGroup], router: Router | None, log: Log) -> None:
        self._clock = clock
        self.groups = groups
        self._router = router
        self._log = log

    def arrive(self, number: int, arrival: Arrival) -> None:
        """A request reaches the router, and so a scheduler, now."""
        group = self._router.route(arrival.model, self._clock.now) if self._router is not None else 0
        if number >= 0:
            self._log.group[number] = group
        self.groups[group].arrive(number, arrival)

    @property
    def busy(self) -> bool:
        """Has any group a request, a transfer or a step?"""
        return any(group.live or group.at_work for group in self.groups)


def router_of(name: str, models: Sequence[SimulatedModel], hardware: Hardware, groups: int) -> Router:
    """Before groups that are alike. Raises ValueError for an unknown router."""
    if name not in ROUTERS:
        raise ValueError(f"no router {name!r}; there are {', '.join(ROUTERS)}")
    size = GroupSize(hardware.frames * hardware.frame_bytes, hardware.link.bandwidth)
    frame_bytes = hardware.frame_bytes
    facts = [ModelFacts(model.name, model.pages(frame_bytes) * frame_bytes, model.max_batch_size) for model in models]
    return Router(ROUTERS[name](), facts, [size] * groups)
