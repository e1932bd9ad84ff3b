"""When the workload begins on the clock, and what will come: the latter for bounds, no real system can know it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean

from computron.simulation.workload import Arrival


class Future:
    """The arrivals of each model at the scheduler, `delay` seconds after they were sent.

    `begin`: the clock's time at which the workload begins; infinite until that is known.
    """

    def __init__(self, arrivals: Iterable[Arrival], delay: float = 0.0) -> None:
        self.begin = 0.0
        self._times: dict[str, list[float]] = {}
        self._last = 0.0
        for arrival in arrivals:
            self._times.setdefault(arrival.model, []).append(arrival.time + delay)
            self._last = arrival.time + delay

    def mean_interval(self, model: str) -> float:
        """Seconds between its requests, on the whole; infinite if it has none, or if all that come do so at once."""
        times = self._times.get(model)
        return self._last / len(times) if times and self._last else math.inf

    def variation(self) -> float:
        """Squared coefficient of variation of the intervals, of all models together; 1 where there are none."""
        squares = [
            ((after - before) / self.mean_interval(model)) ** 2
            for model, times in self._times.items()
            for before, after in pairwise([0.0, *times])
        ]
        return max(0.0, fmean(squares) - 1.0) if squares else 1.0

    def next_arrival(self, model: str, now: float) -> float:
        """The clock's time of the first arrival after `now`, infinite if there is none."""
        times = self._times.get(model, [])
        if math.isinf(self.begin):
            return math.inf
        place = bisect_right(times, now - self.begin)
        return self.begin + times[place] if place < len(times) else math.inf
