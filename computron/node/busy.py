"""How much of a swap was hidden behind compute."""

from __future__ import annotations

from typing import Protocol


class Waiting(Protocol):
    """What a step tells of its own waiting for segments."""

    waited: float
    waiting_since: float | None


class BusyClock:
    """Adds up the seconds in which the device computed, waits for segments left out, to lay beside swaps' seconds."""

    def __init__(self) -> None:
        self._finished = 0.0
        self._step_began: float | None = None
        self._swaps: dict[str, float] = {}

    def step_began(self, now: float) -> None:
        self._step_began = now

    def step_ended(self, now: float, waited: float) -> None:
        if self._step_began is not None:
            self._finished += max(0.0, now - self._step_began - waited)
            self._step_began = None

    def seconds(self, now: float, waiting: Waiting | None) -> float:
        """Seconds computed until `now`, those of the step under way included."""
        if self._step_began is None:
            return self._finished
        waited = 0.0
        if waiting is not None:
            since = waiting.waiting_since  # read once: the compute thread clears it
            waited = waiting.waited + (now - since if since is not None else 0.0)
        return self._finished + max(0.0, now - self._step_began - waited)

    def swap_began(self, model: str, computed: float) -> None:
        self._swaps[model] = computed

    def swap_ended(self, model: str, seconds: float, computed: float) -> float:
        """Share of the swap's `seconds`, 0 to 1, in which the device computed."""
        began = self._swaps.pop(model, computed)
        return min(1.0, (computed - began) / seconds) if seconds > 0 else 1.0
