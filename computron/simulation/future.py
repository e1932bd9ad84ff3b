"""When the workload begins on the clock, and what will come: the latter for bounds, no real system can know it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

from computron.simulation.workload import Arrival


class Future:
    """The arrivals of each model at the scheduler, `delay` seconds after they were sent.

    `begin`: the clock's time at which the workload begins; infinite until that is known.
    """

    def __init__(self, arrivals: Iterable[Arrival], delay: float = 0.0) -> None:
        self.begin = 0.0
        self._times: dict[str, list[float]] = {}
        for arrival in arrivals:
            self._times.setdefault(arrival.model, []).append(arrival.time + delay)

    def next_arrival(self, model: str, now: float) -> float:
        """The clock's time of the first arrival after `now`, infinite if there is none."""
        times = self._times.get(model, [])
        if math.isinf(self.begin):
            return math.inf
        place = bisect_right(times, now - self.begin)
        return self.begin + times[place] if place < len(times) else math.inf
