"""What a policy decides. Everything else, above all what is possible and what is due, is the scheduler's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState


class Policy(Protocol):
    """Reads the board, never changes it.

    Of requests that are due (`max_wait`, deadlines) it is asked only whose pages leave first, and what it does not
    offer is taken from models without work nevertheless.
    """

    name: str
    whole_models: bool  # who gives pages gives all of them; one with work does so under any policy, for it cannot run
    alone: bool  # who comes has the device to itself, but for pinned models

    def next_request(self, model: ModelState, now: float) -> float | None:
        """When the model's next request will come, if that can be said so well that fetching for it pays."""

    def next_to_run(self, board: Board, ready: Sequence[ModelState], now: float) -> ModelState:
        """One of `ready`: resident models with work, in order of rank. Some may be in a step, and have another then."""

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        """The models of `absent` (with work, in order of rank) that are worth a swap-in, the best first."""

    def offers(
        self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float, *, ahead: bool
    ) -> Sequence[tuple[ModelState, int]]:
        """Whose pages leave for `target`, in this order, and at most how many of each; a model may be named again.

        idle: models without work, the one longest unused first. ahead: nobody waits for `target` yet. If somebody does,
        the answer holds for all pieces of a swap-in, until anything else happens.
        """

    def missed(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        """Will `victim`, which has no work, be asked for while `target` comes?"""

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        """May `target` have pages of `victim`, which has work too, and whose turn is over?"""

    def next_to_fetch(self, board: Board, lacking: Sequence[ModelState], now: float) -> list[ModelState]:
        """Those of `lacking` (without work, not complete) that an idle link shall be used for, the best first."""
