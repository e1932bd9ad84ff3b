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
       idle for the sake of order. It is asked anew after each piece of a swap-in, until the oldest request that this
       one is for has waited for as long as the whole of it takes: from then on nothing of the same priority overtakes,
       or models that are asked for all the time could take a page from each other for ever.
    3. The cheapest pages leave, of each model the last ones first, so that what stays is what its next run needs first.
       What a page is worth is how many requests will probably wait for it, while the new model comes, for each second
       that it takes to bring back. A model's last pages hide behind the step that is ordered before they have come, and
       then nobody waits, unless the link has something else to do: they are worth less.
    4. Frames are wanted, and a step that is under way will soon set cheaper ones free, and enough: it is waited for, if
       the rest of it costs those who wait now less than those would lose whose pages left instead.
    5. A model with work gives its frames, all of them, to one without a place if all its requests are younger, its turn
       is over, and the requests of the other have together waited for as long as its own would lose by the change: the
       swap-ins, and the time that the other takes. Rent for as long as buying costs.
    6. On an idle link the model is fetched whose next page is worth most, piece by piece, while those that leave for it
       are worth so much less that chance does not decide, both until it has come and until they would be back; not if
       it is hardly asked for before they usually are.
    """

    name = "default"
    whole_models = False
    alone = False

    def next_request(self, model: ModelState, now: float) -> float | None:
        return model.arrivals.regular_next()

    def chance(self, model: ModelState, within: float, now: float) -> float:
        """How likely the model is asked for within so many seconds."""
        return model.arrivals.chance(within, now)

    def rate(self, model: ModelState) -> float:
        """Requests a second that are expected for the model."""
        return model.arrivals.rate

    def next_to_run(self, board: Board, ready: Sequence[ModelState], now: float) -> ModelState:
        first = ready[0]
        for model in ready:
            if model.spec.continuous and model.admitted and now < model.slice_end and model.rank[0] == first.rank[0]:
                return model
        return first

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        if len(absent) < 2:
            return list(absent)

        def place(model: ModelState) -> tuple[float, float]:
            priority, since = model.rank
            waited = now - since
            if model.begun and waited >= board.tuning.patience * whole_swap_seconds(board, model):
                return priority, -math.inf
            return priority, -self._return(board, model, waited)

        return sorted(absent, key=place)

    def _return(self, board: Board, model: ModelState, waited: float) -> float:
        """Requests served for each second that bringing and running the model takes, times the response ratio.

        The latter, one plus the wait of the oldest request in multiples of those seconds, lets nobody be overtaken for
        ever (highest response ratio next: Brinch Hansen, Short-term scheduling in multiprogramming systems, 1971).
        """
        seconds = swap_seconds(board, model) + model.expected_service()
        if seconds == 0.0:
            return math.inf
        served = min(model.work, model.spec.max_batch_size) + self.rate(model) * seconds
        return served / seconds * (1.0 + waited / seconds)

    def offers(
        self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float, *, ahead: bool
    ) -> list[tuple[ModelState, int]]:
        priced = self._priced(board, target, idle, now, ahead=ahead)
        if ahead:
            limit = self._next_page(board, target, now) / board.tuning.fetch_margin
            priced = [offer for offer in priced if offer[0] < limit and self._may_be_used(board, target, offer[2], now)]
        elif target.has_work and board.running and not board.is_due(target, now):
            limit = self._worth_waiting(board, target, priced, now)
        else:
            limit = math.inf
        return [(model, pages) for worth, _, model, pages in priced if worth < limit]

    def _priced(
        self, board: Board, target: ModelState, idle: Sequence[ModelState], now: float, *, ahead: bool
    ) -> list[tuple[float, int, ModelState, int]]:
        """What so many of the last pages of each model are worth, the cheapest first.

        To leave for a fetch ahead they must also be worth little within the time in which they would come back, or a
        large model and a small one could take the same page from each other for ever.
        """
        within = whole_swap_seconds(board, target)
        priced = []
        for place, model in enumerate(idle):
            worth = self.worth(board, model, within, now)
            if ahead:
                worth = max(worth, self.worth(board, model, whole_swap_seconds(board, model), now))
            hidden = board.hidden_pages(model) - board.ledger.lacking(model.residency)
            if hidden > 0:
                priced.append((worth * self._unhidden(board, model, now), place, model, hidden))
            priced.append((worth, place, model, model.residency.count))
        priced.sort()
        return priced

    def worth(self, board: Board, model: ModelState, within: float, now: float) -> float:
        """Requests that will wait for each second of link that the model lacks: whether one comes within so many
        seconds, and those that come behind it.
        """
        return self.chance(model, within, now) * (1.0 + self.rate(model) * whole_swap_seconds(board, model))

    def _may_be_used(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        """May `target` be asked for before `victim` usually is? Else its pages would come and go again between two
        requests of the other, for next to nothing.
        """
        rate = self.rate(victim)
        return not rate or self.chance(target, 1.0 / rate, now) >= board.tuning.fetch_chance

    def _unhidden(self, board: Board, model: ModelState, now: float) -> float:
        """How likely somebody waits for hidden pages of the model: as likely as two requests come during a swap-in."""
        return self.chance(model, whole_swap_seconds(board, model), now)

    def _next_page(self, board: Board, model: ModelState, now: float) -> float:
        """What the next page is worth that comes for a model that nobody waits for."""
        worth = self.worth(board, model, whole_swap_seconds(board, model), now)
        if board.ledger.lacking(model.residency) <= board.hidden_pages(model):
            worth *= self._unhidden(board, model, now)
        return worth

    def _worth_waiting(
        self, board: Board, target: ModelState, priced: list[tuple[float, int, ModelState, int]], now: float
    ) -> float:
        """What pages must at least be worth so that those of a model in a step are waited for: one that will have
        nothing to do then, and whose pages are enough, with those that are worth less.
        """
        need = board.ledger.lacking(target.residency)
        limit = math.inf
        if need == 0:
            return limit
        within, swap = whole_swap_seconds(board, target), swap_seconds(board, target)
        for model in board.running.values():
            if model.waiting or model.spec.continuous or model.spec.pinned or model.residency.swap is not None:
                continue
            worth = self.worth(board, model, within, now) + target.work * remaining_step(model, now) / swap
            cheaper = {other.name: pages for price, _, other, pages in priced if price < worth}
            if board.ledger.free + model.residency.count + sum(cheaper.values()) >= need:
                limit = min(limit, worth)
        return limit

    def missed(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        return self.chance(victim, whole_swap_seconds(board, target), now) >= board.tuning.sure

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        if victim.oldest_arrival() <= target.oldest_arrival():
            return False
        change = swap_seconds(board, target) + board.link.seconds(len(victim.spec.pages))
        return target.waited(now) >= victim.work * (change + target.expected_service())

    def next_to_fetch(self, board: Board, lacking: Sequence[ModelState], now: float) -> list[ModelState]:
        return [max(lacking, key=lambda model: self._next_page(board, model, now))] if lacking else []


def swap_seconds(board: Board, model: ModelState) -> float:
    """How long bringing what the model lacks would take on an idle link."""
    return board.link.seconds(board.ledger.lacking(model.residency))


def whole_swap_seconds(board: Board, model: ModelState) -> float:
    """How long bringing all of the model would take on an idle link."""
    return board.link.seconds(len(model.spec.pages))


def remaining_step(model: ModelState, now: float) -> float:
    """Seconds until the model's step is expected to end; one that is late is believed in less and less."""
    return abs(model.last_used + (model.expected_step() or 0.0) - now)
