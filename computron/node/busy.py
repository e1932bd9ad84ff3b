"""How much of a swap was hidden behind compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

Interval = tuple[float, float]

REMEMBERED = 4096  # intervals of compute; those of any swap under way are among the last ones


def computing(began: float, ended: float, waits: Sequence[Interval]) -> list[Interval]:
    """When a step from `began` to `ended` computed, if in `waits`, given in order, it waited for segments."""
    edges = [began, *(edge for wait in waits for edge in wait), ended]
    return [(a, b) for a, b in list(pairwise(edges))[::2] if b > a]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as intervals that do not meet, in order."""
    joined: list[Interval] = []
    for a, b in sorted(intervals):
        if joined and a <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(b, joined[-1][1])
        else:
            joined.append((a, b))
    return joined


class BusyClock:
    """Remembers when the device computed, to lay beside the time that a swap took. All times are of one clock.

    Steps may compute at the same time, in different stages of a pipeline: that counts once.
    """

    def __init__(self) -> None:
        self._computed: deque[Interval] = deque(maxlen=REMEMBERED)  # in order; they do not meet

    def add(self, intervals: Sequence[Interval]) -> None:
        """A step has ended; in these intervals, in order, it computed."""
        if not intervals:
            return
        since = [*intervals]
        while self._computed and self._computed[-1][1] >= intervals[0][0]:
            since.append(self._computed.pop())
        self._computed.extend(union(since))

    def hidden_share(self, began: float, ended: float, running: Iterable[Interval] = ()) -> float:
        """Share, 0 to 1, of the time from `began` to `ended` in which the device computed; 1 if nothing took time.

        `running`: intervals of the steps under way.
        """
        if ended <= began:
            return 1.0
        since = [*running]
        for interval in reversed(self._computed):
            if interval[1] <= began:
                break
            since.append(interval)
        overlap = sum(max(0.0, min(b, ended) - max(a, began)) for a, b in union(since))
        return min(1.0, overlap / (ended - began))
