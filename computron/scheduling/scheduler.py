"""The scheduler: events in, actions out. It owns no clock, does no I/O, and never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from computron.scheduling.actions import Action, Reject, RejectReason
from computron.scheduling.board import Board
from computron.scheduling.decisions import Decisions
from computron.scheduling.estimates import Link
from computron.scheduling.events import (
    Event,
    LoadAsked,
    ModelAdded,
    ModelRemoved,
    Request,
    RequestArrived,
    RequestCancelled,
    StageFreed,
    StepAborted,
    StepFailed,
    StepFinished,
    SwapCancelled,
    SwapFailed,
    SwapFinished,
    TimePassed,
    UnloadAsked,
)
from computron.scheduling.ledger import Ledger, Swap
from computron.scheduling.models import ModelState, Step, frames_for
from computron.scheduling.policies import POLICIES
from computron.scheduling.policies.policy import Policy
from computron.scheduling.tuning import Tuning
from computron.scheduling.views import Views
from computron.scheduling.waiting import Ticket


class InvalidTransition(Exception):
    """An event that cannot be a fact: the scheduler and who drives it disagree. The text tells the last events."""


class Scheduler(Views):
    """Decides for one device what is swapped in, evicted and run.

    frames, frame_bytes: the device's memory for parameters and KV caches together.
    link_bandwidth_hint: bytes a second; what is measured replaces it.
    max_wait: seconds; until overload no request waits longer because of others (docs/scheduling.md has the promise).
    prefetch: use an idle link for pages that will probably be wanted.
    max_steps_in_flight: how many steps the device takes at once, each in another one of the stages of its pipeline. A
        model has several only if one pass answers its requests, and `StageFreed` is told.
    """

    def __init__(
        self,
        *,
        frames: int,
        frame_bytes: int,
        link_bandwidth_hint: float,
        policy: str | Policy = "default",
        max_wait: float = 30.0,
        prefetch: bool = True,
        max_steps_in_flight: int = 1,
        tuning: Tuning | None = None,
    ) -> None:
        tuning = tuning or Tuning()
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"no policy {policy!r}; there are {', '.join(sorted(POLICIES))}")
            policy = POLICIES[policy]()
        self.policy = policy
        board = Board(
            ledger=Ledger(frames),
            link=Link(link_bandwidth_hint, frame_bytes, tuning.smoothing),
            max_wait=max_wait,
            tuning=tuning,
            stages=max_steps_in_flight,
        )
        super().__init__(board)
        self._decisions = Decisions(board, policy, prefetch=prefetch, max_steps_in_flight=max_steps_in_flight)
        self._now = float("-inf")
        self._history: deque[tuple[float, Event]] = deque(maxlen=tuning.history)
        self._handlers: dict[type, Callable[..., list[Action]]] = {
            RequestArrived: self._request_arrived,
            RequestCancelled: self._request_cancelled,
            StageFreed: self._stage_freed,
            StepFinished: self._step_finished,
            StepFailed: self._step_failed,
            StepAborted: self._step_aborted,
            SwapFinished: self._swap_finished,
            SwapFailed: self._swap_failed,
            SwapCancelled: self._swap_cancelled,
            ModelAdded: self._model_added,
            ModelRemoved: self._model_removed,
            LoadAsked: self._load_asked,
            UnloadAsked: self._unload_asked,
            TimePassed: self._time_passed,
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take note of the event, and order what follows from it, in the order in which it shall be carried out.

        Raises InvalidTransition if the event contradicts what was ordered or told before, and ValueError for a
        ModelAdded whose pinned pages do not fit. Nothing has changed then.
        """
        if now < self._now:
            raise self._invalid(event, f"time went back from {self._now}")
        actions = self._handlers[type(event)](event, now)
        if not isinstance(event, SwapFinished) or self._board.models[event.model].residency.complete:
            self._board.happened += 1
        self._now = now
        self._history.append((now, event))
        if self._changes_nothing(event):
            return actions
        return actions + self._decisions.decide(now)

    # Requests

    def _request_arrived(self, event: RequestArrived, now: float) -> list[Action]:
        request, board = event.request, self._board
        if request.id in board.tickets:
            raise self._invalid(event, "there is a request with this id")
        model = board.models.get(request.model)
        reason = self._refusal(request, model, now)
        if model is None or reason is not None:
            return [Reject(request.id, request.model, reason or RejectReason.UNKNOWN_MODEL)]
        model.arrivals.add(now)
        board.foresee(model, self.policy.next_request(model, now))
        board.enqueue(request, model)
        board.file(model)
        return []

    def _changes_nothing(self, event: Event) -> bool:
        """Was there nothing new to be decided?

        1. The most frequent event under load: a request waits with others of its model.
        2. A stage is free that nothing waits for.
        """
        if isinstance(event, RequestArrived):
            return self._only_joins(event.request)
        return isinstance(event, StageFreed) and not self._board.overlaps(self._board.models[event.model])

    def _only_joins(self, request: Request) -> bool:
        ticket = self._board.tickets.get(request.id)
        return ticket is not None and request.deadline is None and self._decisions.nothing_new(ticket.model)

    def _refusal(self, request: Request, model: ModelState | None, now: float) -> RejectReason | None:
        """Why this request is not even queued."""
        if model is None:
            return RejectReason.UNKNOWN_MODEL
        if not self._fits_alone(model, request.cache_blocks):
            return RejectReason.TOO_LARGE
        if len(model.waiting) >= model.spec.max_queue and not request.resumed:
            return RejectReason.QUEUE_FULL
        if request.deadline is not None and request.deadline <= now:
            return RejectReason.DEADLINE
        return None

    def _fits_alone(self, model: ModelState, blocks: int) -> bool:
        """Would the model, with one sequence of so many blocks, fit beside nothing but the pinned models?"""
        cache = frames_for(blocks, model.spec.blocks_per_frame) if model.spec.blocks_per_frame else 0
        return cache <= self._board.room_alone(model)

    def _request_cancelled(self, event: RequestCancelled, now: float) -> list[Action]:
        ticket = self._board.tickets.get(event.request)
        if ticket is None:
            return []  # it ended while the cancellation was on its way
        step = ticket.model.in_step(event.request)
        if step is not None:
            step.cancelled.add(event.request)
            return []
        self._end(ticket)
        return []

    def _end(self, ticket: Ticket) -> None:
        self._board.forget(ticket)
        self._board.file(ticket.model)

    # Steps

    def _stage_freed(self, event: StageFreed, now: float) -> list[Action]:
        board, model = self._board, self._model(event, event.model)
        self._first_step(event, model)
        model.stage_free = model.single_pass
        board.file(model)
        return []

    def _step_finished(self, event: StepFinished, now: float) -> list[Action]:
        board, model = self._board, self._model(event, event.model)
        step = self._first_step(event, model)
        strangers = set(event.finished) - step.tickets.keys()
        if strangers:
            raise self._invalid(event, f"requests {sorted(strangers)} are not in it")
        going_on = model.spec.continuous
        model.steps.add(event.seconds, opening=bool(step.opened))
        board.end_step(model, now)
        admitted = model.admitted
        for request in event.cache_blocks.keys() & admitted.keys():
            board.grow(admitted[request], event.cache_blocks[request])
        for request in event.finished if going_on else step.tickets:
            model.steps.answered(admitted[request].served + event.seconds)
            board.forget(admitted[request])
        for request in step.cancelled & admitted.keys():
            board.forget(admitted[request])
        rejected: list[Action] = []
        if admitted and going_on:
            limit = board.limit(now)
            for request in step.tickets.keys() & admitted.keys():
                ticket = admitted[request]
                ticket.since, ticket.limit = now, limit
                ticket.served += event.seconds
            rejected = self._reject_outgrown(list(admitted.values()))
        board.file(model)
        return rejected

    def _reject_outgrown(self, tickets: list[Ticket]) -> list[Action]:
        """Reject those of one model that would not fit even if they had the device to themselves."""
        actions: list[Action] = []
        if not tickets or self._fits_alone(tickets[0].model, max(ticket.blocks for ticket in tickets)):
            return actions
        for ticket in tickets:
            if not self._fits_alone(ticket.model, ticket.blocks):
                self._board.forget(ticket)
                actions.append(Reject(ticket.request.id, ticket.model.name, RejectReason.TOO_LARGE))
        return actions

    def _step_failed(self, event: StepFailed, now: float) -> list[Action]:
        board, model = self._board, self._model(event, event.model)
        step = self._first_step(event, model)
        strangers = set(event.failed) - step.tickets.keys()
        if strangers:
            raise self._invalid(event, f"requests {sorted(strangers)} are not in it")
        board.end_step(model, now)
        for request in step.tickets:
            board.forget(model.admitted[request])
        board.file(model)
        return []

    def _step_aborted(self, event: StepAborted, now: float) -> list[Action]:
        """Its requests wait again, unless their model has been given up; the transfer is as good as ended."""
        board, model = self._board, self._model(event, event.model)
        step = self._first_step(event, model)
        board.end_step(model, now)
        model.stepped = False
        swap = model.residency.swap
        if swap is not None:
            swap.cancelled = True
        actions: list[Action] = []
        for request in step.cancelled:
            board.forget(step.tickets[request])
        for request, ticket in step.tickets.items():
            if request in step.cancelled:
                continue
            if step.given_up:
                board.forget(ticket)
                actions.append(Reject(request, model.name, RejectReason.SWAP_FAILED))
            elif request in step.opened:
                board.requeue(ticket)
        board.file(model)
        return actions

    def _first_step(self, event: Event, model: ModelState) -> Step:
        if not model.under_way:
            raise self._invalid(event, "no step of this model is under way")
        return model.under_way[0]

    # Swaps

    def _swap_finished(self, event: SwapFinished, now: float) -> list[Action]:
        board, model = self._board, self._model(event, event.model)
        swap = self._ended_swap(event, model, event.pages, whole=True)
        if swap.alone and not swap.cancelled:
            board.link_took(swap.frames, event.seconds)
        model.failures = 0
        self._pages_came(model, swap, event.pages, now)
        return []

    def _swap_cancelled(self, event: SwapCancelled, now: float) -> list[Action]:
        model = self._model(event, event.model)
        swap = self._ended_swap(event, model, event.pages, whole=True)
        if not swap.cancelled:
            raise self._invalid(event, "this transfer was not cancelled")
        arrived = event.arrived
        if arrived != swap.pages[: len(arrived)] and not set(arrived) <= set(swap.pages):
            raise self._invalid(event, "pages arrived that were not on their way")
        self._pages_came(model, swap, arrived, now)
        return []

    def _pages_came(self, model: ModelState, swap: Swap, pages: tuple[int, ...], now: float) -> None:
        """The transfer has ended with these pages. Its turn begins if the model is complete now."""
        board = self._board
        board.end_swap(model, pages)
        model.last_used = now
        model.brought += swap.frames if len(pages) == len(swap.pages) else min(swap.frames, len(pages))
        if model.residency.complete:
            model.stepped = False
            model.turn_end = now + board.tuning.keep * board.link.seconds(model.brought)
            model.brought, model.begun = 0, False
            board.ask(model, load=False, unload=model.unload_asked)
        board.file(model)

    def _swap_failed(self, event: SwapFailed, now: float) -> list[Action]:
        board, model = self._board, self._model(event, event.model)
        self._ended_swap(event, model, event.pages, whole=False)
        board.end_swap(model, ())
        model.failures += 1
        model.shunned = True
        actions: list[Action] = []
        if model.failures > board.tuning.swap_retries:
            model.failures = 0
            board.ask(model, load=False, unload=model.unload_asked)
            for step in model.under_way:
                step.given_up = True
            for ticket in model.outside():
                board.forget(ticket)
                actions.append(Reject(ticket.request.id, model.name, RejectReason.SWAP_FAILED))
        board.file(model)
        return actions

    def _ended_swap(self, event: Event, model: ModelState, pages: tuple[int, ...], *, whole: bool) -> Swap:
        swap = model.residency.swap
        if swap is None:
            raise self._invalid(event, "no transfer of this model is under way")
        if pages != swap.pages and (set(pages) - set(swap.pages) or (whole and len(pages) != len(swap.pages))):
            raise self._invalid(event, f"the transfer under way is of pages {swap.pages}")
        return swap

    # Models

    def _model_added(self, event: ModelAdded, now: float) -> list[Action]:
        spec, board = event.spec, self._board
        if spec.model in board.models:
            raise self._invalid(event, "there is a model with this name")
        if spec.pinned:
            pinned = len(board.ledger.pinned.keys() | set(spec.pages))
            if pinned > board.ledger.frames:
                raise ValueError(
                    f"model {spec.model!r} cannot be pinned: with it, pinned models take {pinned} frames, "
                    f"the device has {board.ledger.frames}"
                )
        board.add_model(spec)
        actions: list[Action] = []
        if spec.pinned:
            for model in board.models.values():
                actions += self._reject_outgrown(model.outside())
                board.file(model)
        return actions

    def _model_removed(self, event: ModelRemoved, now: float) -> list[Action]:
        model = self._model(event, event.model)
        if model.under_way or model.residency.swap is not None:
            raise self._invalid(event, "it has a step or a transfer under way")
        self._board.remove_model(model)
        return []

    def _load_asked(self, event: LoadAsked, now: float) -> list[Action]:
        model = self._model(event, event.model)
        load = not model.residency.complete and self._fits_alone(model, 0)
        self._board.ask(model, load=load, unload=False)
        model.arrivals.expect(now)
        return []

    def _unload_asked(self, event: UnloadAsked, now: float) -> list[Action]:
        model = self._model(event, event.model)
        self._board.ask(model, load=False, unload=True)
        return []

    # Time

    def _time_passed(self, event: TimePassed, now: float) -> list[Action]:
        self._decisions.time_passed()
        return []

    # Errors

    def _model(self, event: Event, name: str) -> ModelState:
        model = self._board.models.get(name)
        if model is None:
            raise self._invalid(event, "there is no such model")
        return model

    def _invalid(self, event: Event, why: str) -> InvalidTransition:
        history = "\n".join(f"  {time:.6f} {past}" for time, past in self._history)
        return InvalidTransition(f"{event}: {why}. Before it:\n{history}")
