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


class BusyClock:
    """Remembers when the device computed, to lay beside the time that a swap took. All times are of one clock."""

    def __init__(self) -> None:
        self._computed: deque[Interval] = deque(maxlen=REMEMBERED)

    def add(self, intervals: Iterable[Interval]) -> None:
        """A step has ended; in these intervals, in order, it computed."""
        self._computed.extend(intervals)

    def hidden_share(self, began: float, ended: float, running: Sequence[Interval] = ()) -> float:
        """Share, 0 to 1, of the time from `began` to `ended` in which the device computed; 1 if nothing took time.

        `running`: intervals of the step under way, in order.
        """
        if ended <= began:
            return 1.0
        overlap = 0.0
        for a, b in (*reversed(running), *reversed(self._computed)):
            if b <= began:
                break
            overlap += max(0.0, min(b, ended) - max(a, began))
        return min(1.0, overlap / (ended - began))
