"""What to do now. Called once after each event; reads the board, gives orders, and notes them on the board.

The cases, in this order:
1. Deadlines that passed: reject.
2. Something is due: it is served next, strictly in the order in which things became due.
   - resident: nothing else starts before it.
   - absent: its swap-in is ordered, by force if need be; one under way for something later is cancelled.
   - on its way: others run only if they will have ended when it can start.
3. Nothing is due and no swap-in is under way: the policy's choice comes, into
   - free frames, spare cache and pages of models without work;
   - else also pages of models with work whose turn is over, if the policy says so.
4. A step can start: the policy's choice of the resident models runs; else a model whose pages are on their way.
5. A swap-in is under way: one more model with work is fetched behind it. The link is idle: a model whose next
   request can be foretold. Both into frames that the policy can spare.
6. The link is idle: what an operator asked for is loaded, or unloaded.
7. Nothing is under way and nothing could start, but there is work: the first model on the due agenda that can be
   served by force is. The oldest admitted sequence never loses its cache, so that this cannot go round in a circle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from computron.scheduling.actions import (
    Action,
    CancelSwap,
    Evict,
    EvictionReason,
    Preempt,
    RaiseUrgency,
    Reject,
    RejectReason,
    Run,
    SetCache,
    SwapIn,
    Urgency,
    WakeAt,
)
from computron.scheduling.board import Board
from computron.scheduling.frames import Reach, plan_room, preemption_order
from computron.scheduling.models import ModelState, Step, frames_for
from computron.scheduling.policy import Policy

REASONS = {
    Urgency.DEMAND: EvictionReason.DEMAND,
    Urgency.PREFETCH: EvictionReason.PREFETCH,
    Urgency.BACKGROUND: EvictionReason.PREFETCH,
}


class Decisions:
    def __init__(self, board: Board, policy: Policy, *, prefetch: bool, max_steps_in_flight: int) -> None:
        self._board = board
        self._policy = policy
        self._prefetch = prefetch
        self._max_steps = max_steps_in_flight
        self._actions: list[Action] = []
        self._wake: float | None = None

    def decide(self, now: float) -> list[Action]:
        """Everything that can be ordered now. What cannot waits for an event, or for the time of a `WakeAt`."""
        board = self._board
        actions: list[Action] = []
        self._actions = actions
        for ticket in board.expired(now):
            self._reject(ticket.request.id, RejectReason.DEADLINE)
        self._bring_next(now)
        self._run_next(now)
        if self._prefetch:
            self._fetch_behind(now)
            self._fetch_ahead(now)
        self._obey(now)
        if not board.running and not board.loading and board.due:
            self._serve_by_force(now)
        self._release_caches()
        self._ask_to_wake(now)
        return actions

    def time_passed(self) -> None:
        """The timer has gone off."""
        self._wake = None

    # 1. Deadlines

    def _reject(self, request: int, reason: RejectReason) -> None:
        ticket = self._board.tickets[request]
        self._board.forget(ticket)
        self._board.file(ticket.model)
        self._actions.append(Reject(request, ticket.model.name, reason))

    # 2., 3. Who comes

    def _bring_next(self, now: float) -> None:
        board = self._board
        demand = self._demand()
        for model in self._due_now(now):
            if model.residency.complete:
                continue
            if demand is not None and demand is not model and demand.step is None and not self._is_due(demand, now):
                self._cancel(demand)
            if model.loading:
                self._raise(model)
            elif demand is None:
                self._order(model, Urgency.DEMAND, Reach.DUE, now)
            return
        if demand is not None:
            if not demand.has_work and board.absent and not demand.spec.pinned:
                self._cancel(demand)
            return
        for model in board.load_asked.values():
            if model.spec.pinned and self._want(model, Reach.DUE, now):
                return
        fetched = [model for model in board.loading.values() if model.loading and model.has_work]
        reach = Reach.AGREED
        for model in fetched or self._policy.next_to_bring(board, board.absent.head(board.tuning.candidates), now):
            if self._want(model, reach, now):
                return
            reach = Reach.IDLE

    def _want(self, model: ModelState, reach: Reach, now: float) -> bool:
        if model.loading:
            self._raise(model)
            return True
        return self._order(model, Urgency.DEMAND, reach, now)

    def _order(self, model: ModelState, urgency: Urgency, reach: Reach, now: float) -> bool:
        """Order the swap-in of everything that the model lacks; False if that cannot be now."""
        board, residency = self._board, model.residency
        if residency.swap is not None or model.step is not None:
            return False
        awaited = board.ledger.awaited(residency)
        if awaited is not None:
            owner = board.models[awaited.name]
            if urgency == Urgency.DEMAND and owner.loading:
                self._raise(owner)
            return False
        frames = board.ledger.lacking(residency)
        if frames > board.ledger.free:
            self._set_cache(model, min(residency.cache, model.least_cache_need(now)))
        while not self._make_room(model, frames + self._cache_gap(model, now), reach, REASONS[urgency], now):
            if reach < Reach.ALL or not self._preempt_own(model, now):
                return False
        seconds = board.link.seconds(frames)
        start = now
        for other in board.loading.values():
            swap = other.residency.swap
            assert swap is not None
            swap.alone = False
            if swap.urgency <= urgency and not swap.cancelled:
                start = max(start, swap.expected_end)
            else:
                swap.expected_end += seconds
        swap = board.ledger.order(residency, urgency, now, start + seconds)
        swap.alone = not board.loading
        self._actions.append(SwapIn(model.name, swap.pages, urgency))
        board.file(model)
        return True

    def _make_room(self, model: ModelState, frames: int, reach: Reach, reason: EvictionReason, now: float) -> bool:
        """See to it that so many frames are free. A fetch behind the demand gives way if that helps."""
        board = self._board
        need = frames - board.ledger.free
        if need <= 0:
            return True
        plan = plan_room(board, self._policy, model, need, reach, now)
        if plan.enough:
            self._actions += plan.commit(reason, now)
            return True
        for other in list(board.loading.values()):
            swap = other.residency.swap
            assert swap is not None
            if (
                reach > Reach.IDLE
                and other.loading
                and other.step is None
                and swap.urgency > Urgency.DEMAND
                and plan.gained + swap.frames >= need
            ):
                self._cancel(other)
        return False

    def _cache_gap(self, model: ModelState, now: float) -> int:
        """Frames that the model's cache lacks for its next step."""
        return max(0, model.least_cache_need(now) - model.residency.cache)

    def _preempt_own(self, model: ModelState, now: float) -> bool:
        """Let one of several sequences go: the lowest priority and the youngest first, never the oldest."""
        if len(model.admitted) < 2:
            return False
        oldest = min(model.admitted.values(), key=lambda ticket: ticket.seniority)
        victim = min((ticket for ticket in model.admitted.values() if ticket is not oldest), key=preemption_order)
        self._board.preempt(victim, now)
        self._actions.append(Preempt(model.name, victim.request.id))
        return True

    def _demand(self) -> ModelState | None:
        for model in self._board.loading.values():
            swap = model.residency.swap
            if swap is not None and swap.urgency == Urgency.DEMAND and not swap.cancelled:
                return model
        return None

    def _due_now(self, now: float) -> Iterator[ModelState]:
        for model in self._board.due:
            if not self._is_due(model, now):
                return
            yield model

    def _is_due(self, model: ModelState, now: float) -> bool:
        due = self._board.due.key(model)
        return due is not None and due[0] <= now

    def _raise(self, model: ModelState) -> None:
        swap = model.residency.swap
        assert swap is not None
        if swap.urgency != Urgency.DEMAND:
            swap.urgency = Urgency.DEMAND
            self._actions.append(RaiseUrgency(model.name, Urgency.DEMAND))

    def _cancel(self, model: ModelState) -> None:
        """Its pages that have come stay; its frames are its own until the cancellation is confirmed."""
        swap = model.residency.swap
        assert swap is not None
        assert model.step is None
        swap.cancelled = True
        self._actions.append(CancelSwap(model.name))
        self._board.file(model)

    # 4. Who runs

    def _run_next(self, now: float) -> None:
        board = self._board
        refused: set[str] = set()
        while len(board.running) < self._max_steps:
            model = self._choose(refused, now)
            if model is None:
                return
            reach = Reach.DUE if self._is_due(model, now) else Reach.AGREED
            if not self._start(model, reach, now):
                refused.add(model.name)

    def _choose(self, refused: set[str], now: float) -> ModelState | None:
        board = self._board
        ready = [
            model for model in board.ready.head(board.tuning.candidates + len(refused)) if model.name not in refused
        ]
        demand = self._demand()
        if demand is not None and (demand.step is not None or not demand.has_work or demand.name in refused):
            demand = None
        before: ModelState | None = None  # due, and on the link: others may run only until it can start
        for due in self._due_now(now):
            if due.name in refused:
                continue
            if due is demand:
                if self._may_start_early(due, now):
                    return due
                before = due
            elif due.residency.complete:
                if before is None or self._ends_before(due, before, now):
                    return due
            elif self._cancelling():
                return None  # frames for it come free in a moment, and no step shall hold those that it needs
        if before is not None:
            ready = [model for model in ready if self._ends_before(model, before, now)]
        if (
            demand is not None
            and self._may_start_early(demand, now)
            and (not ready or self._is_before(demand, ready[0]))
        ):
            return demand
        return self._policy.next_to_run(board, ready, now) if ready else None

    def _cancelling(self) -> bool:
        """Is a cancelled transfer about to end?"""
        return any(not model.loading for model in self._board.loading.values())

    def _may_start_early(self, model: ModelState, now: float) -> bool:
        return now >= self._early_start_time(model)

    def _early_start_time(self, model: ModelState) -> float:
        """When a run may start whose pages are still on the link. It holds the node until they have come.

        1. No step of the model has been timed: at once.
        2. It generates, and no other model is resident that requests could come for: at once. A prompt may be longer
           than those before it, and requests that come meanwhile join the next step.
        3. Else when the rest of the transfer is short against its step, so that compute still hides behind it, other
           models have the node until then, and what arrives meanwhile joins the batch.
        """
        swap = model.residency.swap
        early = self._board.tuning.early_start
        if swap is None or early == 0.0:
            return math.inf
        step = model.expected_step()
        if step is None or (model.spec.continuous and self._board.complete == 0):
            return -math.inf
        return swap.expected_end - early * step

    def _ends_before(self, model: ModelState, due: ModelState, now: float) -> bool:
        """Would a step of `model` have ended by the time when `due`, whose pages are on the link, should start?"""
        swap, step = due.residency.swap, model.expected_step()
        assert swap is not None
        return step is not None and now + step <= swap.expected_end - (due.expected_step() or 0.0)

    def _is_before(self, model: ModelState, other: ModelState) -> bool:
        return self._board.rank(model) < self._board.rank(other)

    def _start(self, model: ModelState, reach: Reach, now: float) -> bool:
        """Start a step with everything that is admitted and what may join; False if the cache lacks room."""
        board, residency = self._board, model.residency
        before = len(model.admitted)
        if model.spec.blocks_per_frame:
            if not self._fit_cache(model, reach, now):
                return False
        else:
            while model.waiting and model.free_slots > 0:
                board.admit(model.waiting.first(now))
        model.step = Step(dict(model.admitted), early=not residency.complete, opening=len(model.admitted) > before)
        for ticket in model.admitted.values():
            ticket.started = True
        model.last_used = now
        board.file(model)
        self._actions.append(Run(model.name, tuple(model.admitted)))
        return True

    def _fit_cache(self, model: ModelState, reach: Reach, now: float) -> bool:
        """Admit what finds room, and give the cache its frames.

        1. What is admitted, or else the first that waits, must fit. If it does not, a fetch behind the demand gives
           way; then the model's own sequences do, the lowest priority and the youngest first, but never the oldest.
        2. More join while places are free, as far as spare frames and idle models allow.
        """
        board, residency, per_frame = self._board, model.residency, model.spec.blocks_per_frame
        while not self._make_room(model, self._cache_gap(model, now), reach, EvictionReason.CACHE, now):
            if self._cancelling() or not self._preempt_own(model, now):
                return False
        if not model.admitted:
            board.admit(model.waiting.first(now))
        blocks = model.held_blocks
        frames = max(residency.cache, frames_for(blocks, per_frame))
        while model.waiting and model.free_slots > 0:
            ticket = model.waiting.first(now)
            wanted = max(frames, frames_for(blocks + ticket.blocks, per_frame))
            if not self._make_room(model, wanted - residency.cache, Reach.IDLE, EvictionReason.CACHE, now):
                break
            board.admit(ticket)
            blocks, frames = blocks + ticket.blocks, wanted
        self._set_cache(model, frames)
        return True

    def _set_cache(self, model: ModelState, frames: int) -> None:
        if frames != model.residency.cache:
            self._board.ledger.set_cache(model.residency, frames)
            self._actions.append(SetCache(model.name, frames))
            self._board.file(model)

    # 5. Who is fetched behind the demand

    def _fetch_behind(self, now: float) -> None:
        """One model, at a lower urgency; a demand overtakes it on the link, and may have its frames."""
        board = self._board
        demand = self._demand()
        if demand is None or len(board.loading) > 1 or not board.absent:
            return
        candidates = board.absent.head(board.tuning.candidates)
        for model in self._policy.next_to_bring(board, candidates, now):
            if self._order(model, Urgency.PREFETCH, Reach.SPARE, now):
                return

    def _fetch_ahead(self, now: float) -> None:
        """On an idle link, a model whose next request is about to come. Each forecast is tried once."""
        board = self._board
        while (foretold := board.next_foretold()) is not None and foretold[0] <= now:
            board.drop_foretold()
            model = foretold[1]
            if not board.loading and not model.has_work and not model.residency.complete and not model.unload_asked:
                self._order(model, Urgency.PREFETCH, Reach.SPARE, now)

    # 6. What operators asked for

    def _obey(self, now: float) -> None:
        board = self._board
        for model in list(board.unload_asked.values()):
            if not model.has_work and model.step is None:
                self._unload(model)
        if not board.loading:
            for model in board.load_asked.values():
                if self._order(model, Urgency.BACKGROUND, Reach.IDLE, now):
                    return

    def _unload(self, model: ModelState) -> None:
        residency = model.residency
        if residency.swap is not None:
            if model.loading:
                self._cancel(model)
            return
        self._set_cache(model, 0)
        pages = residency.mapped_pages()
        if pages:
            if residency.complete:
                self._board.complete -= 1
            self._board.ledger.evict(residency, pages)
            self._actions.append(Evict(model.name, tuple(reversed(pages)), EvictionReason.UNLOAD))
        model.unload_asked = False
        self._board.file(model)

    # 7. When nothing goes

    def _serve_by_force(self, now: float) -> None:
        for model in list(self._board.due):
            if model.residency.complete:
                if self._start(model, Reach.ALL, now):
                    return
            elif self._order(model, Urgency.DEMAND, Reach.ALL, now):
                return
        raise AssertionError(f"nothing is under way and nothing fits: {list(self._board.due)}")

    # Housekeeping

    def _release_caches(self) -> None:
        for model in list(self._board.cached.values()):
            if model.step is None and not model.has_work:
                self._set_cache(model, 0)

    def _ask_to_wake(self, now: float) -> None:
        """The next moment when time alone changes what should be done: a deadline, something due, an early start."""
        board = self._board
        times = []
        deadline = board.next_deadline()
        if deadline is not None:
            times.append(deadline)
        due = board.due.first_after((now,))
        if due is not None:
            times.append(due[0])
        foretold = board.next_foretold()
        if self._prefetch and foretold is not None and not foretold[1].residency.complete:
            times.append(foretold[0])
        demand = self._demand()
        if demand is not None and demand.has_work and demand.step is None:
            times.append(self._early_start_time(demand))
        ahead = [time for time in times if now < time < math.inf]
        if ahead and (self._wake is None or min(ahead) < self._wake):
            self._wake = min(ahead)
            self._actions.append(WakeAt(self._wake))
