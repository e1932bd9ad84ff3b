"""The gate of one step, which remembers when the step waited at it."""

from __future__ import annotations

import time

from computron.memory.gate import Gate
from computron.node.busy import Interval, computing


class MeasuredGate:
    """Passes the waits of one step on to the swap's gate and remembers them."""

    __slots__ = ("_began", "_ended", "_gate", "_waiting_since", "_waits")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._began = self._ended = time.monotonic()
        self._waits: list[Interval] = []
        self._waiting_since: float | None = None

    @property
    def is_open(self) -> bool:
        return self._gate.is_open

    def wait(self, segment: int, stream: int = 0) -> None:
        began = self._waiting_since = time.monotonic()
        try:
            self._gate.wait(segment, stream)
        finally:
            self._waits.append((began, time.monotonic()))
            self._waiting_since = None

    def begin(self) -> None:
        """The step starts on the compute thread."""
        self._began = time.monotonic()

    def end(self) -> None:
        self._ended = time.monotonic()

    def computing(self, now: float) -> list[Interval]:
        """When the step has computed so far. May be called from another thread."""
        since, waits = self._waiting_since, list(self._waits)
        return computing(self._began, now, waits if since is None else [*waits, (since, now)])

    def computed_seconds(self) -> float:
        """Seconds in which the step, which has ended, computed."""
        return sum(b - a for a, b in computing(self._began, self._ended, self._waits))

    def waited_seconds(self) -> float:
        """Seconds in which the step waited for pages."""
        return sum(b - a for a, b in self._waits)
