"""What a policy decides. Everything else, above all what is possible and what is due, is the scheduler's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState

Offer = tuple[ModelState, int | None]  # a model, and how many pages from its end may be taken at most


class Policy(Protocol):
    """Reads the board, never changes it. Requests that are due (`max_wait`, deadlines) never come to a policy."""

    name: str
    whole_models: bool  # who leaves, leaves with all its pages

    def next_to_run(self, board: Board, ready: Sequence[ModelState], now: float) -> ModelState:
        """One of `ready`: resident models with work, in order of rank."""

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        """The models of `absent` (with work, in order of rank) that are worth a swap-in, the best first."""

    def victims(self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float) -> Iterable[Offer]:
        """In which order pages leave for `target`. `idle`: models without work, the one longest unused first."""

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        """May `target` have pages of `victim`, which has work too, and whose turn is over?"""


class Lru:
    """Computron's: the oldest request is served first, and the model that was used least recently leaves, as a whole.

    1. Several models are resident and have work: the one with the oldest request runs.
    2. Several models are absent and have work: the one with the oldest request comes; nothing else may come before it.
    3. Frames are wanted: models without work leave, least recently used first; then models whose requests are all
       younger.
    """

    name = "lru"
    whole_models = True

    def next_to_run(self, board: Board, ready: Sequence[ModelState], now: float) -> ModelState:
        return ready[0]

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        return list(absent[:1])

    def victims(self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float) -> Iterable[Offer]:
        return ((model, None) for model in idle)

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        return oldest(victim) > oldest(target)


def oldest(model: ModelState) -> float:
    """When the oldest of its requests began to wait. The model has work."""
    times = [ticket.request.arrival for ticket in model.admitted.values()]
    if model.waiting:
        times.append(model.waiting.first_due().request.arrival)
    return min(times)
