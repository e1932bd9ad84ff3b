"""Whose frames may be had, and how far one may go for them."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from itertools import islice

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState
from computron.scheduling.policies.policy import Policy
from computron.scheduling.room import RoomPlan
from computron.scheduling.waiting import Ticket


class Reach(enum.IntEnum):
    """How far to go for frames; each one includes those before it.

    SPARE: spare cache, and pages of models without work that the policy can spare for a fetch ahead.
    IDLE: spare cache, and pages of models without work that the policy offers.
    AGREED: pages of models with work whose turn is over, where the policy agrees; and those of younger requests' models
        that cannot run with what they have. Not while the policy keeps pages of models without work.
    DUE: all pages of models without work; those of any model with work whose turn is over and that is not due earlier;
        then paused sequences.
    ALL: the same without regard to turns. Only when nothing is under way and nothing could start otherwise.
    """

    SPARE = 0
    IDLE = 1
    AGREED = 2
    DUE = 3
    ALL = 4


class Offers:
    """Whose pages leave for a model, as the policy said before the first piece of its swap-in.

    It is asked again once anything but the pieces has happened, or one of those models has nothing left.
    """

    __slots__ = ("_board", "_happened", "_kept", "_policy", "_target")

    def __init__(self, board: Board, policy: Policy) -> None:
        self._board = board
        self._policy = policy
        self._target: ModelState | None = None
        self._happened = -1
        self._kept: list[tuple[ModelState, int]] = []  # and how many pages each of them keeps

    def of(
        self, target: ModelState, idle: Sequence[ModelState], now: float, *, ahead: bool
    ) -> list[tuple[ModelState, int]]:
        """Models, and at most how many pages of each. idle: those that are weighed if the policy is asked."""
        board = self._board
        if ahead:  # whether it pays changes with each page
            return list(self._policy.offers(board, target, idle, now, ahead=True))
        known = self._target is target and self._happened == board.happened
        if not (known and all(model.held_in is board.idle for model, _ in self._kept)):
            self._target, self._happened = target, board.happened
            offers = self._policy.offers(board, target, idle, now, ahead=False)
            self._kept = [(model, model.residency.count - pages) for model, pages in offers]
        return [(model, pages) for model, kept in self._kept if (pages := model.residency.count - kept) > 0]


def plan_room(
    board: Board, policy: Policy, offers_of: Offers, target: ModelState, need: int, reach: Reach, now: float
) -> RoomPlan:
    """A plan that frees `need` frames for `target`, or as many as can be had.

    Never taken: frames of a model in a step, pages of a pinned model or of one with a transfer under way, contents
    that `target` would map, the cache of the oldest admitted sequence.
    """
    plan = RoomPlan(board, need, board.ledger.wanted_contents(target.residency))
    for model in list(board.cached.values()):
        if model is not target and not model.under_way:
            plan.take_spare_cache(model)
        if plan.enough:
            return plan
    if need > plan.gained + board.idle_pages and reach <= Reach.IDLE:
        return plan
    withheld = False
    for place, group in enumerate(_groups(board.idle, board.tuning.candidates)):
        ahead = reach == Reach.SPARE
        offers = (
            policy.offers(board, target, group, now, ahead=ahead)
            if place
            else offers_of.of(target, group, now, ahead=ahead)
        )
        for model, pages in offers:
            if model is not target and model.held_in is board.idle:
                plan.take_pages(model, None if policy.whole_models else pages)
            if plan.enough:
                return plan
        withheld = withheld or _keeps(group, offers)
        if not offers:
            break  # from those that were used later still less could be had
    if reach < Reach.AGREED or (reach == Reach.AGREED and withheld):
        return plan
    if withheld:
        _take_idle(board, plan, target, whole=policy.whole_models)
    for model in sorted(board.busy.values(), key=lambda model: (model.residency.complete, model.last_used)):
        if not plan.enough and gives(board, policy, target, model, reach, now):
            more = target.spec.continuous and not target.begun  # its cache will want frames too
            whole = policy.whole_models or model.residency.complete or more
            plan.take_pages(model, None if whole else model.residency.count)
    if reach >= Reach.DUE:
        for ticket in _sequences(board, target, reach, now):
            plan.take_sequence(ticket)
            if plan.enough:
                return plan
    return plan


def _keeps(idle: Sequence[ModelState], offers: Sequence[tuple[ModelState, int]]) -> bool:
    """Does the policy withhold pages of these models?"""
    offered: dict[str, int] = {}
    for model, pages in offers:
        offered[model.name] = max(pages, offered.get(model.name, 0))
    return any(offered.get(model.name, 0) < model.residency.count for model in idle)


def _take_idle(board: Board, plan: RoomPlan, target: ModelState, *, whole: bool) -> None:
    """Pages of models without work, whether the policy offers them or not."""
    for model in list(board.idle.values()):
        if plan.enough:
            return
        if model is not target:
            plan.take_pages(model, None if whole else model.residency.count)


def gives(board: Board, policy: Policy, target: ModelState, victim: ModelState, reach: Reach, now: float) -> bool:
    """Does the victim, which has work, give its pages to the target? While it is in a step: once that has ended."""
    if victim is target or _has_turn(board, target, victim, reach, now):
        return False
    if reach > Reach.AGREED or victim.promised is target or _hoards(target, victim):
        return True
    return policy.may_take(board, target, victim, now)


def _hoards(target: ModelState, victim: ModelState) -> bool:
    """Does the victim keep pages that it cannot run with, while an older request waits for them?"""
    return not victim.residency.complete and victim.oldest_arrival() > target.oldest_arrival()


def _groups(models: dict[str, ModelState], size: int) -> Iterator[list[ModelState]]:
    iterator = iter(list(models.values()) if len(models) <= size else models.values())
    while group := list(islice(iterator, size)):
        yield group


def _has_turn(board: Board, target: ModelState, victim: ModelState, reach: Reach, now: float) -> bool:
    """Does the victim's turn stand against the target?

    1. It came in so recently that its swap-in has not paid off: yes.
    2. It is due, and its limit is not after the target's: yes.
    3. It has not run since it came in: yes, unless the target is due.
    """
    if reach == Reach.ALL:
        return False
    if board.is_due(victim, now) and victim.limit <= target.limit:
        return True
    if not victim.residency.complete:
        return False
    if now < victim.turn_end:
        return True
    return reach == Reach.AGREED and not victim.stepped and not victim.under_way


def _sequences(board: Board, target: ModelState, reach: Reach, now: float) -> list[Ticket]:
    """Paused sequences of other models, the first to lose its cache first: lowest priority, then youngest."""
    admitted = [ticket for model in board.cached.values() for ticket in model.admitted.values()]
    if not admitted:
        return []
    senior = min(admitted, key=lambda ticket: ticket.seniority)
    paused = [
        ticket
        for ticket in admitted
        if ticket is not senior
        and ticket.model is not target
        and not ticket.model.under_way
        and not _has_turn(board, target, ticket.model, reach, now)
    ]
    return sorted(paused, key=preemption_order)


def preemption_order(ticket: Ticket) -> tuple[int, float, int]:
    arrival, request = ticket.seniority
    return (ticket.request.priority, -arrival, -request)
