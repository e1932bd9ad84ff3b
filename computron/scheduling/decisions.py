"""What to do now. Called once after each event; reads the board, gives orders, and notes them on the board.

The cases, in this order:
1. Deadlines that passed: reject.
2. Something is due: it is served next, strictly in the order of the limits.
   - resident: nothing else starts before it.
   - absent: its swap-in is ordered, by force if need be; one under way for something later is cancelled.
   - on its way: others run only if they will have ended when it can start.
3. Nothing is due and no swap-in is under way: the next piece of the policy's choice comes, into
   - free frames, spare cache and pages of models without work;
   - else also pages of models with work whose turn is over, if the policy says so.
4. A step can start: the policy's choice of the resident models runs; else a model whose pages are on their way. A model
   that is in a step has another one behind it, in the stage of the pipeline that it has left, unless its pages are
   promised to whoever comes next, or to a resident model whose cache lacks them.
5. The link is idle: what an operator asked for is loaded, or unloaded.
6. The link is idle, and nothing waits for it: the next piece comes of the model that the policy chooses, into frames
   that it can spare for that.
7. Nothing is under way and nothing could start, but there is work: the first model on the due agenda that can be
   served by force is. The oldest admitted sequence never loses its cache, so that this cannot go round in a circle.
"""

from __future__ import annotations

import math
from itertools import islice

from computron.scheduling.actions import (
    Action,
    RejectReason,
    Urgency,
    WakeAt,
)
from computron.scheduling.board import Board
from computron.scheduling.frames import Reach
from computron.scheduling.models import ModelState
from computron.scheduling.orders import Orders
from computron.scheduling.policies.policy import Policy
from computron.scheduling.promises import Promises


class Decisions:
    def __init__(self, board: Board, policy: Policy, *, prefetch: bool, max_steps_in_flight: int) -> None:
        self._board = board
        self._policy = policy
        self._orders = Orders(board, policy)
        self._promises = Promises(board, policy)
        self._prefetch = prefetch
        self._max_steps = max_steps_in_flight
        self._wake: float | None = None
        self._fetched_in_vain = -1  # when nothing was worth a fetch ahead: `stirred` of the board then

    def decide(self, now: float) -> list[Action]:
        """Everything that can be ordered now. What cannot waits for an event, or for the time of a `WakeAt`."""
        board = self._board
        actions: list[Action] = []
        self._orders.actions = actions
        for ticket in board.expired(now):
            self._orders.reject(ticket.request.id, RejectReason.DEADLINE)
        self._bring_next(now)
        self._run_next(now)
        if board.unload_asked or board.load_asked:
            self._obey(now)
        if self._prefetch:
            self._fetch_ahead(now)
        if not board.running and not board.loading and (board.due_ready or board.due_absent):
            self._serve_by_force(now)
        if board.cached:
            self._release_caches()
        self._ask_to_wake(now)
        return actions

    def nothing_new(self, model: ModelState) -> bool:
        """Has a request without a deadline that came for this model changed nothing that could be decided now?

        1. The model is in a step, and cannot have another one yet: the request can join the next one at the earliest.
        2. Others wait for the same model already, and the link is taken.
        """
        if model.under_way:
            return not self._board.overlaps(model) or self._board.steps >= self._max_steps
        return model.work > 1 and self._demand() is not None

    def time_passed(self) -> None:
        """The timer has gone off."""
        self._wake = None
        self._fetched_in_vain = -1

    # 2., 3. Who comes

    def _bring_next(self, now: float) -> None:
        board = self._board
        if not board.due_absent and not board.loading and not board.load_asked:
            return  # all that have work are there
        demand = self._demand()
        due = board.due_absent.first()
        if due is not None and board.is_due(due, now):
            if demand is not None and demand is not due and not demand.under_way and not board.is_due(demand, now):
                self._orders.cancel(demand)
            if due.loading:
                self._orders.make_demand(due)
            elif demand is None:
                self._orders.swap_in(due, Urgency.DEMAND, Reach.DUE, now)
            return
        if demand is not None:
            if not demand.has_work and board.due_absent and not demand.spec.pinned:
                self._orders.cancel(demand)
            return
        for model in board.load_asked.values():
            if model.spec.pinned and self._want(model, Reach.DUE, now):
                return
        fetched = [model for model in board.loading.values() if model.loading and model.has_work]
        reach = Reach.AGREED
        for model in fetched or self._next_to_bring(now):
            if self._want(model, reach, now):
                return
            reach = Reach.IDLE

    def _next_to_bring(self, now: float) -> list[ModelState]:
        """The policy's choice; before it, what pages have been promised to."""
        board, promised = self._board, self._promises.target
        chosen = self._policy.next_to_bring(board, board.absent.head(board.tuning.candidates), now)
        if promised is None or promised not in board.absent:
            return chosen
        return [promised, *(model for model in chosen if model is not promised)]

    def _want(self, model: ModelState, reach: Reach, now: float) -> bool:
        if model.loading:
            self._orders.make_demand(model)
            return True
        return self._orders.swap_in(model, Urgency.DEMAND, reach, now)

    def _demand(self) -> ModelState | None:
        for model in self._board.loading.values():
            swap = model.residency.swap
            if swap is not None and swap.urgency == Urgency.DEMAND and not swap.cancelled:
                return model
        return None

    # 4. Who runs

    def _run_next(self, now: float) -> None:
        board = self._board
        if board.steps >= self._max_steps:
            return
        self._promises.review(now)
        self._promise(now)
        refused: set[str] = set()
        while board.steps < self._max_steps:
            model = self._choose(refused | self._promises.held_back(self._demand(), now), now)
            if model is None:
                return
            reach = Reach.DUE if board.is_due(model, now) else Reach.AGREED
            if not self._orders.start(model, reach, now):
                refused.add(model.name)
                self._promises.make(model, self._orders.frames_wanted(model, now), reach, now)
                self._promises.in_vain(model)

    def _promise(self, now: float) -> None:
        """Whoever comes next, as it is due or as the policy says, shall have the pages of models that never pause."""
        board = self._board
        target, reach = board.due_absent.first(), Reach.DUE
        if target is None or not board.running:
            return
        if not board.is_due(target, now):
            if self._promises.target is not None or not any(board.overlaps(model) for model in board.running.values()):
                return
            target, reach = self._next_choice(now), Reach.AGREED
        if target is not None and not target.loading:
            self._promises.make(target, self._orders.frames_wanted(target, now), reach, now)

    def _next_choice(self, now: float) -> ModelState | None:
        """Who the policy would bring next. That may be again who has a piece on the link now."""
        board, demand = self._board, self._demand()
        absent = board.absent.head(board.tuning.candidates)
        if demand is not None and demand.has_work and not demand.completing:
            absent = sorted([*absent, demand], key=lambda model: model.rank)
        return next(iter(self._policy.next_to_bring(board, absent, now)), None)

    def _choose(self, refused: set[str], now: float) -> ModelState | None:
        board = self._board
        if not board.due_ready and not board.loading:
            return None
        count = board.tuning.candidates + len(refused)
        demand = self._demand()
        if demand is not None and (demand.under_way or not demand.has_work or demand.name in refused):
            demand = None
        awaited = demand if demand is not None and board.is_due(demand, now) else None  # others may not delay its start
        due = next((model for model in board.due_ready.head(count) if model.name not in refused), None)
        if due is not None and not board.is_due(due, now):
            due = None
        if awaited is None and self._frames_come_free(due, now):
            return None
        if due is not None and (awaited is None or due.limit <= awaited.limit):
            return due
        ready = [model for model in board.ready.head(count) if model.name not in refused]
        if awaited is not None:
            ready = [model for model in ready if self._ends_before(model, awaited, now)]
        if demand is not None and now >= self._early_start_time(demand, alone=not ready):
            if not ready or demand is awaited or demand.rank < ready[0].rank:
                return demand
        elif due in ready:
            return due
        return self._policy.next_to_run(board, ready, now) if ready else None

    def _frames_come_free(self, due: ModelState | None, now: float) -> bool:
        """Is a cancelled transfer about to end for something due before `due`? No step shall hold what that needs."""
        board = self._board
        first = board.due_absent.first()
        if first is None or not board.is_due(first, now) or (due is not None and due.limit <= first.limit):
            return False
        return self._orders.cancelling()

    def _early_start_time(self, model: ModelState, *, alone: bool) -> float:
        """When a run may start whose pages are still on the link. It holds the node until they have come.

        1. Nothing else could run, and no step of the model has been timed: at once.
        2. Nothing else could run, nor is another model resident that requests could come for, and this one generates:
           at once. A prompt may be longer than those before it, and what comes meanwhile joins the next step.
        3. Else when the rest of the transfer is short against its step, so that compute still hides behind it, other
           models have the node until then, and what arrives meanwhile joins the batch.
        """
        swap, board = model.residency.swap, self._board
        if swap is None or not model.completing or board.tuning.early_start == 0.0:
            return math.inf
        step = model.expected_step()
        if alone and (step is None or (model.spec.continuous and board.complete == 0)):
            return -math.inf
        return math.inf if step is None else swap.expected_end - board.hides(model)

    def _ends_before(self, model: ModelState, due: ModelState, now: float) -> bool:
        """Would a step of `model` have ended by the time when `due`, whose pages are on the link, should start?"""
        swap, step = due.residency.swap, model.expected_step()
        assert swap is not None
        complete = swap.expected_end + self._board.link.seconds(swap.rest)
        return step is not None and now + step <= complete - (due.expected_step() or 0.0)

    # 5. What operators asked for

    def _obey(self, now: float) -> None:
        board = self._board
        for model in list(board.unload_asked.values()):
            if not model.has_work and not model.under_way:
                self._orders.unload(model)
        if not board.loading:
            for model in board.load_asked.values():
                if self._orders.swap_in(model, Urgency.BACKGROUND, Reach.IDLE, now):
                    return

    # 6. Who is fetched ahead

    def _fetch_ahead(self, now: float) -> None:
        """On a link that nothing waits for, a model whose next request will probably come before those of others."""
        board = self._board
        foretold = []
        while (following := board.next_foretold()) is not None and following[0] <= now:
            board.drop_foretold()
            foretold.append(following[1])
        if board.loading or board.absent or not board.lacking:
            return
        if self._fetched_in_vain == board.stirred and not foretold:
            return
        foretold = [model for model in foretold if model.name in board.lacking]
        lately = list(islice(reversed(board.lacking.values()), board.tuning.candidates))
        for model in foretold + self._policy.next_to_fetch(board, lately, now):
            if not model.unload_asked and self._orders.swap_in(model, Urgency.PREFETCH, Reach.SPARE, now):
                return
        self._fetched_in_vain = board.stirred

    # 7. When nothing goes

    def _serve_by_force(self, now: float) -> None:
        models = sorted([*self._board.due_ready, *self._board.due_absent], key=lambda model: model.limit)
        for model in models:
            if model.residency.complete:
                if self._orders.start(model, Reach.ALL, now):
                    return
            elif self._orders.swap_in(model, Urgency.DEMAND, Reach.ALL, now):
                return
        raise AssertionError(f"nothing is under way and nothing fits: {models}")

    # Housekeeping

    def _release_caches(self) -> None:
        for model in list(self._board.cached.values()):
            if not model.under_way and not model.has_work:
                self._orders.set_cache(model, 0)

    def _ask_to_wake(self, now: float) -> None:
        """The next moment when time alone changes what should be done: a deadline, something due, an early start."""
        board = self._board
        wake = self._wake if self._wake is not None else math.inf
        earliest = wake
        deadline = board.next_deadline()
        if deadline is not None and now < deadline < earliest:
            earliest = deadline
        due = board.next_due(now)
        if due is not None and now < due < earliest:
            earliest = due
        if self._prefetch:
            foretold = board.next_foretold()
            if foretold is not None and now < foretold[0] < earliest and not foretold[1].residency.complete:
                earliest = foretold[0]
        demand = self._demand()
        if demand is not None and demand.has_work and not demand.under_way:
            early = self._early_start_time(demand, alone=not board.ready)
            if now < early < earliest:
                earliest = early
        if earliest < wake:
            self._wake = earliest
            self._orders.actions.append(WakeAt(earliest))
