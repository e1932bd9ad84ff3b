"""The default policy: what a swap costs against what waits for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState


class Default:
    """Its cases:

    1. Several resident models have work: the highest priority runs; among equals the one that waited longest. One that
       generates goes on for a time slice, so that requests gather behind it and share their steps; then others have
       their turn.
    2. Several absent models have work: of the highest priority, the one that serves most requests for each second of
       link and device comes first, counting those that will probably arrive meanwhile, and more the longer it waited.
       The others follow in that order if their frames can be had from models without work, so that the link is never
       idle for the sake of order.
    3. Pages leave whose model is expected to be wanted latest: as many as are needed, the last ones first, so that what
       stays is what its next run needs first.
    4. A model with work gives its frames, all of them, to one without a place if all its requests are younger, its turn
       is over, and the requests of the other have together waited for as long as its own would lose by the change: the
       swap-ins, and the time that the other takes. Rent for as long as buying costs.
    5. On an idle link, of the models whose requests come regularly, that one is fetched which is expected first, if
       those that give pages for it are expected so much later that chance does not decide.
    """

    name = "default"
    whole_models = False
    alone = False

    def next_request(self, model: ModelState, now: float) -> float | None:
        return model.arrivals.regular_next()

    def next_in(self, model: ModelState, now: float) -> float:
        """Expected seconds until the model's next request."""
        return model.arrivals.next_in(now)

    def missed_in(self, model: ModelState, now: float) -> float:
        """The same for who decides what leaves: the longer a model has been silent, the more its past is doubted.

        Where requests come at random, this lies half-way between least recently and least frequently used.
        """
        return self.next_in(model, now) + min(1.0, self.variation(model)) * model.arrivals.silence(now)

    def variation(self, model: ModelState) -> float:
        """Squared coefficient of variation of the intervals between its requests."""
        return model.arrivals.variation

    def next_to_run(self, board: Board, ready: Sequence[ModelState], now: float) -> ModelState:
        first = ready[0]
        for model in ready:
            if model.admitted and now < model.slice_end and board.rank(model)[0] == board.rank(first)[0]:
                return model
        return first

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        if len(absent) < 2:
            return list(absent)

        def place(model: ModelState) -> tuple[float, float]:
            priority, since = board.rank(model)
            return priority, -self._return(board, model, now - since)

        return sorted(absent, key=place)

    def _return(self, board: Board, model: ModelState, waited: float) -> float:
        """Requests served for each second that bringing and running the model takes, times the response ratio.

        The latter, one plus the wait of the oldest request in multiples of those seconds, lets nobody be overtaken for
        ever (highest response ratio next: Brinch Hansen, Short-term scheduling in multiprogramming systems, 1971).
        """
        seconds = swap_seconds(board, model) + model.expected_service()
        if seconds == 0.0:
            return math.inf
        served = min(model.work, model.spec.max_batch_size) + model.arrivals.rate * seconds
        return served / seconds * (1.0 + waited / seconds)

    def victims(self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float) -> Sequence[ModelState]:
        return sorted(idle, key=lambda model: -self.missed_in(model, now))

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        if victim.oldest_arrival() <= target.oldest_arrival():
            return False
        change = swap_seconds(board, target) + board.link.seconds(len(victim.spec.pages))
        return target.waited(now) >= victim.work * (change + target.expected_service())

    def next_to_fetch(self, board: Board, lacking: Sequence[ModelState], now: float) -> list[ModelState]:
        regular = [model for model in lacking if self.variation(model) <= board.tuning.regular]
        return sorted(regular, key=lambda model: self.next_in(model, now))[: board.tuning.fetch_tries]

    def spare(self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float) -> list[ModelState]:
        variation = self.variation(target)
        if variation > board.tuning.regular:
            return []  # where requests come at random, pages are better left to whom they serve
        margin = 1.0 + board.tuning.fetch_margin * variation
        wanted = max(swap_seconds(board, target), margin * self.next_in(target, now))
        return [model for model in idle if self.next_in(model, now) > wanted]


def swap_seconds(board: Board, model: ModelState) -> float:
    """How long bringing what the model lacks would take on an idle link."""
    return board.link.seconds(board.ledger.lacking(model.residency))
