"""A clock that jumps from one thing that happens to the next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Clock:
    """What is planned for the same time happens in the order in which it was planned."""

    __slots__ = ("_numbers", "_planned", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it at this time, or now if that has passed. A plan cannot be withdrawn."""
        heapq.heappush(self._planned, (max(time, self.now), next(self._numbers), call, arguments))

    @property
    def next_time(self) -> float | None:
        return self._planned[0][0] if self._planned else None

    def advance(self) -> None:
        """Let the next thing happen. Something is planned."""
        time, _, call, arguments = heapq.heappop(self._planned)
        self.now = time
        call(*arguments)
