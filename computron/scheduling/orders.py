"""Giving an order: what it takes to carry it out, noted on the board together with the action that says so."""

from __future__ import annotations

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
)
from computron.scheduling.board import Board
from computron.scheduling.frames import Offers, Reach, plan_room, preemption_order
from computron.scheduling.models import ModelState, Step, frames_for
from computron.scheduling.policies.policy import Policy
from computron.scheduling.room import RoomPlan

REASONS = {
    Urgency.DEMAND: EvictionReason.DEMAND,
    Urgency.PREFETCH: EvictionReason.PREFETCH,
    Urgency.BACKGROUND: EvictionReason.PREFETCH,
}


class Orders:
    """Each order either is given, and then the board and `actions` have it, or changes neither and returns False."""

    def __init__(self, board: Board, policy: Policy) -> None:
        self.actions: list[Action] = []
        self._board = board
        self._policy = policy
        self._offers = Offers(board, policy)

    def swap_in(self, model: ModelState, urgency: Urgency, reach: Reach, now: float) -> bool:
        """Order the swap-in of what the model lacks, or of the next piece of it; False if that cannot be now."""
        board, residency = self._board, model.residency
        if residency.swap is not None or model.under_way:
            return False
        awaited = board.ledger.awaited(residency)
        if awaited is not None:
            owner = board.models[awaited.name]
            if urgency == Urgency.DEMAND and owner.loading:
                self.make_demand(owner)
            return False
        frames = board.ledger.lacking(residency)
        if frames > board.ledger.free:
            self.set_cache(model, min(residency.cache, model.least_cache_need(now + board.lead)))
        piece = self._piece(model, frames, urgency, reach, now)
        if piece is not None:
            if not self._make_room(model, piece, reach, REASONS[urgency], now):
                return False
            frames = piece
            model.begun = urgency == Urgency.DEMAND
        else:
            while not self._make_room(model, self.frames_wanted(model, now), reach, REASONS[urgency], now):
                if reach < Reach.ALL or not self._preempt_own(model):
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
        pages = residency.unmapped() if piece is None else board.ledger.first_lacking(residency, piece)
        swap = board.begin_swap(model, pages, urgency, now, start + seconds)
        self.actions.append(SwapIn(model.name, swap.pages, urgency))
        return True

    def _piece(self, model: ModelState, frames: int, urgency: Urgency, reach: Reach, now: float) -> int | None:
        """How many of the `frames` that the model lacks shall be brought now; None: all of them.

        1. What is due comes as a whole, and so does everything where models leave as a whole.
        2. So does a model whose step may start at once, for which all its pages must be on their way: none of its steps
           has been timed, or it generates and no other is resident.
        3. What hides behind the step, which then starts early, comes with the last piece.
        4. For those who wait the first piece comes only if there is room for all, from models without work. What models
           with work give they give as a whole, and then nothing is gained by bringing less; but those that were asked
           for when they had lost pages to earlier pieces lose no more with each further one than it needs.
        5. Nor is anything gained if all who give will be asked for meanwhile: they would all be back before the first
           of them has lost much, and then wait for each other.
        """
        board = self._board
        if reach >= Reach.DUE or self._policy.whole_models or self._policy.alone:
            return None
        if model.expected_step() is None or (model.spec.continuous and board.complete == 0):
            return None
        ahead = urgency == Urgency.PREFETCH
        piece = max(1, round(min(frames, board.tuning.piece / board.link.frame_seconds)))
        if piece >= frames or (not ahead and board.link.seconds(frames - piece) < board.hides(model)):
            return None
        if not ahead and (not model.begun or piece > board.ledger.free + board.idle_pages):
            plan = self._plan(model, piece if model.begun else frames + self._cache_gap(model, now), reach, now)
            givers = plan.givers()
            if plan.preempts or not plan.enough:
                return None
            if any(giver.has_work and (giver.residency.complete or not model.begun) for giver in givers):
                return None
            if not model.begun and givers and all(self._policy.missed(board, model, giver, now) for giver in givers):
                return None
        return piece

    def _make_room(self, model: ModelState, frames: int, reach: Reach, reason: EvictionReason, now: float) -> bool:
        """See to it that so many frames are free. A fetch behind the demand gives way if that helps."""
        plan = self._plan(model, frames, reach, now)
        if plan.enough:
            self.actions += plan.commit(reason)
            return True
        board, need = self._board, frames - self._board.ledger.free
        for other in list(board.loading.values()):
            swap = other.residency.swap
            assert swap is not None
            if (
                reach > Reach.IDLE
                and other.loading
                and not other.under_way
                and swap.urgency > Urgency.DEMAND
                and plan.gained + swap.frames >= need
            ):
                self.cancel(other)
        return False

    def _plan(self, model: ModelState, frames: int, reach: Reach, now: float) -> RoomPlan:
        """What to take so that so many frames are free."""
        board = self._board
        need = frames - board.ledger.free
        if need <= 0:
            return RoomPlan(board, 0, set())
        return plan_room(board, self._policy, self._offers, model, need, reach, now)

    def frames_wanted(self, model: ModelState, now: float) -> int:
        """Frames that must be free for all of the model to come, and for its next step."""
        board, residency = self._board, model.residency
        frames = board.ledger.lacking(residency)
        wanted = frames + self._cache_gap(model, now)
        if self._policy.alone and not residency.complete:
            wanted = max(wanted, board.room_alone(model) + frames - residency.cache)
        return wanted

    def _cache_gap(self, model: ModelState, now: float) -> int:
        """Frames that the model's cache lacks for its next step."""
        return max(0, model.least_cache_need(now + self._board.lead) - model.residency.cache)

    def _preempt_own(self, model: ModelState) -> bool:
        """Let one of several sequences go: the lowest priority and the youngest first, never the oldest."""
        if len(model.admitted) < 2:
            return False
        oldest = min(model.admitted.values(), key=lambda ticket: ticket.seniority)
        victim = min((ticket for ticket in model.admitted.values() if ticket is not oldest), key=preemption_order)
        self._board.requeue(victim)
        self.actions.append(Preempt(model.name, victim.request.id))
        return True

    def make_demand(self, model: ModelState) -> None:
        swap = model.residency.swap
        assert swap is not None
        if swap.urgency != Urgency.DEMAND:
            swap.urgency = Urgency.DEMAND
            self.actions.append(RaiseUrgency(model.name, Urgency.DEMAND))

    def cancel(self, model: ModelState) -> None:
        """Its pages that have come stay; its frames are its own until the cancellation is confirmed."""
        swap = model.residency.swap
        assert swap is not None
        assert not model.under_way
        swap.cancelled = True
        self.actions.append(CancelSwap(model.name))
        self._board.file(model)

    def cancelling(self) -> bool:
        """Is a cancelled transfer about to end?"""
        return any(not model.loading for model in self._board.loading.values())

    def start(self, model: ModelState, reach: Reach, now: float) -> bool:
        """Start a step with what may join, and with what is admitted and in no step; False if the cache lacks room."""
        board, residency = self._board, model.residency
        before = model.admitted.copy()
        in_steps = len(before) if model.under_way else 0
        if model.spec.blocks_per_frame:
            if not self._fit_cache(model, reach, now):
                return False
        else:
            while model.waiting and model.free_slots + in_steps > 0:
                board.admit(model.waiting.first(now + board.lead))
        opened = tuple(request for request in model.admitted if request not in before)
        tickets = {request: model.admitted[request] for request in opened} if in_steps else model.admitted.copy()
        board.begin_step(model, Step(tickets, early=not residency.complete, opened=opened), now)
        self.actions.append(Run(model.name, tuple(tickets)))
        return True

    def _fit_cache(self, model: ModelState, reach: Reach, now: float) -> bool:
        """Admit what finds room, and give the cache its frames.

        1. What is admitted, or else the first that waits, must fit. If it does not, a fetch behind the demand gives
           way; then the model's own sequences do, the lowest priority and the youngest first, but never the oldest.
        2. More join while places are free, as far as spare frames and idle models allow.
        """
        board, residency, per_frame = self._board, model.residency, model.spec.blocks_per_frame
        while not self._make_room(model, self._cache_gap(model, now), reach, EvictionReason.CACHE, now):
            if self.cancelling() or not self._preempt_own(model):
                return False
        if not model.admitted:
            board.admit(model.waiting.first(now + board.lead))
        blocks = model.held_blocks
        frames = max(residency.cache, frames_for(blocks, per_frame))
        while model.waiting and model.free_slots > 0:
            ticket = model.waiting.first(now + board.lead)
            wanted = max(frames, frames_for(blocks + ticket.blocks, per_frame))
            if not self._make_room(model, wanted - residency.cache, Reach.IDLE, EvictionReason.CACHE, now):
                break
            board.admit(ticket)
            blocks, frames = blocks + ticket.blocks, wanted
        self.set_cache(model, frames)
        return True

    def set_cache(self, model: ModelState, frames: int) -> None:
        if frames != model.residency.cache:
            self._board.set_cache(model, frames)
            self.actions.append(SetCache(model.name, frames))

    def unload(self, model: ModelState) -> None:
        residency = model.residency
        model.shunned = True
        if residency.swap is not None:
            if model.loading:
                self.cancel(model)
            return
        self.set_cache(model, 0)
        pages = residency.mapped_pages()
        if pages:
            self._board.evict(model, pages)
            self.actions.append(Evict(model.name, tuple(reversed(pages)), EvictionReason.UNLOAD))
        self._board.ask(model, load=False, unload=False)
        self._board.file(model)

    def reject(self, request: int, reason: RejectReason) -> None:
        ticket = self._board.tickets[request]
        self._board.forget(ticket)
        self._board.file(ticket.model)
        self.actions.append(Reject(request, ticket.model.name, reason))
