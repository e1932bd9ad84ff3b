"""What others may see of the scheduler: for metrics, operators and tests. Nothing here changes anything."""

from __future__ import annotations

from typing import Literal

from computron.scheduling.board import Board


class Views:
    """Methods that name a model raise KeyError if there is none of that name."""

    def __init__(self, board: Board) -> None:
        self._board = board

    @property
    def free_frames(self) -> int:
        return self._board.ledger.free

    @property
    def frames(self) -> int:
        return self._board.ledger.frames

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._board.models)

    def queue_depth(self, model: str) -> int:
        """Requests that wait for their first step, or for a new one after they lost their cache."""
        return len(self._board.models[model].waiting)

    def running_count(self, model: str) -> int:
        """Requests that are in a step, or between two steps with their cache kept."""
        return len(self._board.models[model].admitted)

    @property
    def waiting(self) -> int:
        return sum(len(model.waiting) for model in self._board.models.values())

    @property
    def running(self) -> int:
        return len(self._board.tickets) - self.waiting

    def resident_fraction(self, model: str) -> float:
        residency = self._board.models[model].residency
        return residency.count / len(residency.contents) if residency.contents else 1.0

    def lacking(self, model: str) -> int:
        """Its pages that are not on the device, or still on their way."""
        residency = self._board.models[model].residency
        return len(residency.contents) - residency.count

    def cache_frames(self, model: str) -> int:
        return self._board.models[model].residency.cache

    def state(self, model: str) -> Literal["absent", "partial", "loading", "resident", "running"]:
        known = self._board.models[model]
        if known.under_way:
            return "running"
        if known.loading:
            return "loading"
        if known.residency.complete:
            return "resident"
        return "partial" if known.residency.count else "absent"

    def check(self) -> None:
        """Raises AssertionError if the scheduler's books contradict each other."""
        self._board.check()
