"""The policy of the published Computron, on pages instead of a count of models."""

from __future__ import annotations

from collections.abc import Sequence

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState


class Lru:
    """The oldest request is served first, and the model that was used least recently leaves, as a whole.

    1. Several models are resident and have work: the one with the oldest request runs.
    2. Several models are absent and have work: the one with the oldest request comes; nothing else may come before it.
    3. Frames are wanted: models without work leave, least recently used first; then models whose requests are all
       younger. What is fetched ahead gets free frames only.
    """

    name = "lru"
    whole_models = True
    alone = False

    def next_request(self, model: ModelState, now: float) -> float | None:
        return None

    def next_to_run(self, board: Board, ready: Sequence[ModelState], now: float) -> ModelState:
        return ready[0]

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        return list(absent[:1])

    def offers(
        self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float, *, ahead: bool
    ) -> Sequence[tuple[ModelState, int]]:
        return [] if ahead else [(model, model.residency.count) for model in idle]

    def missed(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        return False

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        return victim.oldest_arrival() > target.oldest_arrival()

    def next_to_fetch(self, board: Board, lacking: Sequence[ModelState], now: float) -> list[ModelState]:
        return []
