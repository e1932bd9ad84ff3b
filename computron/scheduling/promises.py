"""Pages of models that never pause: promised to who wants them, and given once the steps under way have ended."""

from __future__ import annotations

import math

from computron.scheduling.board import Board
from computron.scheduling.frames import Reach, gives
from computron.scheduling.models import ModelState
from computron.scheduling.policies.policy import Policy


class Promises:
    """A model that has one step behind the other has no moment in which its pages could be taken. Who wants them and
    may have them is promised them, and those of others in a step that it needs as well. Then none of these models has
    a further step, but for what ends before the link is free.

    That is decided once: what they do not serve gathers, which must not be a reason to take the promise back. It ends
    when `target` has what it wanted or does not want it any more, when the pages are lost or due for an earlier limit,
    and when all steps have ended and it was still not enough.
    """

    def __init__(self, board: Board, policy: Policy) -> None:
        self._board = board
        self._policy = policy
        self._givers: list[ModelState] = []
        self._awaited: list[ModelState] = []  # these, and those that will have nothing to do when their step has ended
        self.target: ModelState | None = None

    def make(self, target: ModelState, need: int, reach: Reach, now: float) -> None:
        """Promise `target` so many frames, if models in a step and those that pause have them together, and only so.

        For what is not due that is so only where a model never pauses; for what is due also where models pause, but not
        all at the same time.
        """
        board = self._board
        if reach < Reach.DUE:
            settled = self.target is not None and self.target is not target
            if settled or not any(board.overlaps(model) for model in board.running.values()):
                return
        stepping = [model for model in board.running.values() if not model.spec.pinned and model.residency.swap is None]
        idle_soon = [model for model in stepping if not model.work]
        need -= board.ledger.free + board.idle_pages + sum(model.residency.count for model in idle_soon)
        candidates = [*board.busy.values(), *(model for model in stepping if model.work)]
        givers = self._givers_of(target, candidates, need, reach, now)
        if not givers or not any(model.under_way for model in (*idle_soon, *givers)):
            return
        if target is self.target:
            givers += [model for model in self._givers if model not in givers]
        self._withdraw()
        self.target, self._givers, self._awaited = target, givers, [*idle_soon, *givers]
        for model in givers:
            model.promised = target

    def _givers_of(
        self, target: ModelState, candidates: list[ModelState], need: int, reach: Reach, now: float
    ) -> list[ModelState]:
        """The first of these models with work that have so many frames together; none if all of them have not."""
        givers = []
        for model in candidates:
            if need <= 0:
                break
            if model.residency.count and gives(self._board, self._policy, target, model, reach, now):
                givers.append(model)
                need -= model.residency.count
        return givers if need <= 0 else []

    def review(self, now: float) -> None:
        """Take back what is of no use any more."""
        board, target = self._board, self.target
        if target is None:
            return
        if not target.has_work or target.under_way or target.loading or target.name not in board.models:
            self._withdraw()
            return
        for model in self._givers[:]:
            if not model.residency.complete or (board.is_due(model, now) and model.limit <= target.limit):
                model.promised = None
                self._givers.remove(model)
        if not target.residency.complete:
            self.in_vain(target)

    def in_vain(self, target: ModelState) -> None:
        """It could not have what it wanted: end the promise unless there is something that it still waits for."""
        pending = self._board.loading or any(model.under_way for model in self._awaited)
        if target is self.target and not pending:
            self._withdraw()

    def held_back(self, demand: ModelState | None, now: float) -> set[str]:
        """Models that shall have no further step. demand: what the link brings now."""
        swap = demand.residency.swap if demand is not None else None
        if swap is None:
            return {model.name for model in self._givers}
        return {model.name for model in self._givers if now + (model.expected_step() or math.inf) > swap.expected_end}

    def _withdraw(self) -> None:
        for model in self._givers:
            model.promised = None
        self._givers, self._awaited, self.target = [], [], None
