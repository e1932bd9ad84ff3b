"""How busy devices are, and what of that falls into given spans of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Spans:
    """Spans of time on groups, [begins[i], ends[i]) on groups[i], from rows that have `group` and `ended`."""

    def __init__(self, rows: Sequence[Any], begin: Callable[[Any], float]) -> None:
        self.begins = np.fromiter(map(begin, rows), np.float64, len(rows))
        self.ends = np.fromiter(map(attrgetter("ended"), rows), np.float64, len(rows))
        self.groups = np.fromiter(map(attrgetter("group"), rows), np.int64, len(rows))

    def of(self, group: int) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = self.groups == group
        return chosen


class Busy:
    """Each span is busy for some seconds, evenly; a group is never more than wholly busy."""

    def __init__(self, spans: Spans, seconds: Floats) -> None:
        self._totals: dict[int, tuple[Floats, Floats]] = {}
        for group in np.unique(spans.groups).tolist():
            chosen = spans.of(group) & (spans.ends > spans.begins)
            begins, ends = spans.begins[chosen], spans.ends[chosen]
            density = seconds[chosen] / (ends - begins)
            times = np.concatenate((begins, ends))
            order = np.argsort(times, kind="stable")
            times = times[order]
            level = np.cumsum(np.concatenate((density, -density))[order])
            spent = np.clip(level[:-1], 0.0, 1.0) * np.diff(times)
            self._totals[group] = times, np.concatenate(([0.0], np.cumsum(spent)))

    def within(self, spans: Spans) -> float:
        """Busy seconds within the spans; what two spans share counts twice."""
        seconds = 0.0
        for group, (times, totals) in self._totals.items():
            chosen = spans.of(group)
            if len(times):
                until = np.interp(spans.ends[chosen], times, totals)
                before = np.interp(spans.begins[chosen], times, totals)
                seconds += float((until - before).sum())
        return seconds
