"""One group of nodes in numbers: carries out the scheduler's actions, and tells it what came of them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

from computron.scheduling.actions import (
    Action,
    CancelSwap,
    Evict,
    Preempt,
    RaiseUrgency,
    Reject,
    Run,
    SetCache,
    SwapIn,
    WakeAt,
)
from computron.scheduling.events import (
    ModelAdded,
    ModelSpec,
    Request,
    RequestArrived,
    StageFreed,
    StepFinished,
    SwapCancelled,
    SwapFinished,
    TimePassed,
)
from computron.simulation.clock import Clock
from computron.simulation.contents import Contents
from computron.simulation.future import Future
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.link import Transfer, VirtualLink
from computron.simulation.log import EvictionRow, Log, StepRow, SwapRow
from computron.simulation.pipeline import Pipeline, VirtualStep
from computron.simulation.surroundings import Surroundings
from computron.simulation.workload import Arrival


class Decider(Protocol):
    """The scheduler, or another that understands the same events and gives the same orders."""

    def handle(self, event: Any, now: float) -> list[Action]: ...


class Observer(Protocol):
    """Told what a router learns of a group."""

    def pages_came(self, group: int, model: str, pages: int) -> None: ...

    def pages_left(self, group: int, model: str, pages: int) -> None: ...

    def request_ended(self, group: int, model: str, seconds: float | None) -> None:
        """seconds: of the steps that it was part of; None if it was rejected."""


class Live:
    """A request that has arrived and not ended. tokens: of its sequence so far. left: of its `steps`.

    seconds: of compute of the steps that it was part of.
    """

    __slots__ = ("arrival", "holds_cache", "left", "number", "seconds", "steps", "tokens")

    def __init__(self, number: int, arrival: Arrival, steps: int) -> None:
        self.number = number
        self.arrival = arrival
        self.steps = self.left = steps
        self.tokens = arrival.prompt_tokens
        self.seconds = 0.0
        self.holds_cache = False


class Swap:
    """A transfer under way. new: those of its pages that move."""

    __slots__ = ("new", "pages", "transfer")

    def __init__(self, pages: tuple[int, ...], new: tuple[int, ...]) -> None:
        self.pages = pages
        self.new = new
        self.transfer: Transfer


class VirtualGroup:
    """Requests are named by their number in the workload; negative ones are not logged (they warm up)."""

    def __init__(
        self,
        number: int,
        clock: Clock,
        hardware: Hardware,
        models: Sequence[SimulatedModel],
        decider: Decider,
        surroundings: Surroundings,
        log: Log,
        future: Future,
        observer: Observer | None = None,
    ) -> None:
        self.number = number
        self._clock = clock
        self._hardware = hardware
        self._models = {model.name: model for model in models}
        self._decider = decider
        self._surroundings = surroundings
        self._log = log
        self._future = future
        self._observer = observer
        self._contents = Contents()
        self._link = VirtualLink(clock, hardware.link, hardware.frame_bytes)
        self._pipeline = Pipeline(clock, hardware.stages)
        self._held: list[tuple[VirtualStep, set[str]]] = []  # steps, and the transfers that they queue behind
        self._page_counts: dict[str, int] = {}
        self.live: dict[int, Live] = {}
        self._swaps: dict[str, Swap] = {}
        self._steps: dict[str, deque[VirtualStep]] = {}  # under way, of each model, in order
        self._present: Counter[str] = Counter()  # pages that have come and not left
        self._wake: float | None = None

    @property
    def at_work(self) -> bool:
        """Is a transfer or a step under way?"""
        return bool(self._swaps or self._steps)

    def add_models(self, specs: Sequence[ModelSpec]) -> None:
        for spec in specs:
            self._contents.add(spec.model, spec.pages, self._models[spec.model].shares is not None)
            self._page_counts[spec.model] = len(spec.pages)
            self._tell(ModelAdded(spec))

    def arrive(self, number: int, arrival: Arrival) -> None:
        """A request reaches the scheduler now."""
        model = self._models[arrival.model]
        self.live[number] = Live(number, arrival, max(1, arrival.output_tokens) if model.continuous else 1)
        deadline = None
        if arrival.deadline is not None:
            deadline = self._clock.now - self._hardware.request_overhead + arrival.deadline
        blocks = self._blocks(arrival.prompt_tokens) if model.cache_bytes_per_token else 0
        self._tell(RequestArrived(Request(number, arrival.model, self._clock.now, arrival.priority, deadline, blocks)))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._hardware.block_tokens)

    def _tell(self, event: Any) -> None:
        for action in self._decider.handle(event, self._clock.now):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Run():
                self._run(action)
            case SwapIn():
                self._swap_in(action)
            case Evict():
                self._evict(action)
            case WakeAt(time):
                self._wake = time
                self._clock.at(time, self._woken, time)
            case RaiseUrgency(model, urgency):
                self._link.raise_urgency(self._swaps[model].transfer, urgency)
            case CancelSwap(model):
                self._cancel(model)
            case Preempt(_, request):
                self.live[request].holds_cache = False
            case Reject(request, _, reason):
                live = self.live.pop(request)
                if request >= 0:
                    self._log.rejected[request] = reason.value
                if self._observer is not None:
                    self._observer.request_ended(self.number, live.arrival.model, None)
            case SetCache():
                pass  # the scheduler's ledger counts frames; tests hold it to that

    def wake(self) -> None:
        """Let the scheduler decide anew, without anything having happened."""
        self._tell(TimePassed())

    def _woken(self, time: float) -> None:
        if self._wake == time:
            self._wake = None
            self._tell(TimePassed())

    # Transfers

    def _swap_in(self, action: SwapIn) -> None:
        swap = Swap(action.pages, self._contents.take(action.model, action.pages))
        self._swaps[action.model] = swap
        swap.transfer = self._link.bring(
            len(swap.new), action.urgency, lambda transfer: self._came(action.model, transfer)
        )

    def _came(self, model: str, transfer: Transfer) -> None:
        swap = self._swaps.pop(model)
        self._present[model] += len(swap.pages)
        self._log_swap(model, transfer, transfer.frames, cancelled=False)
        for step in self._steps.get(model, ()):
            if step.arrivals is None and all(step is not held for held, _ in self._held):
                step.arrivals = self._segments(model, swap)
        self._let_go(model)
        self._pipeline.go_on()
        if self._observer is not None:
            self._observer.pages_came(self.number, model, len(swap.pages))
        self._tell(SwapFinished(model, swap.pages, self._clock.now - transfer.ordered))

    def _segments(self, model: str, swap: Swap) -> tuple[float, ...]:
        """When each segment of the model had come, from the first to the last."""
        count = self._page_counts[model]
        segments = min(self._models[model].segments, count) or 1
        arrivals = []
        for segment in range(segments):
            came = bisect_left(swap.new, (segment + 1) * count // segments)  # pages come in ascending order
            arrivals.append(swap.transfer.arrival(came - 1) if came else 0.0)
        return tuple(arrivals)

    def _let_go(self, ended: str) -> None:
        """This transfer no longer holds up the copies of steps."""
        for step, behind in self._held:
            behind.discard(ended)
            if not behind:
                step.arrivals = (self._clock.now,)
        self._held = [held for held in self._held if held[1]]

    def _cancel(self, model: str) -> None:
        swap = self._swaps[model]
        self._link.cancel(swap.transfer)
        self._clock.at(self._clock.now, self._cancelled, model)

    def _cancelled(self, model: str) -> None:
        swap = self._swaps.pop(model)
        missing = swap.new[swap.transfer.arrived :]
        self._contents.give(model, missing, len(missing))
        gone = set(missing)
        arrived = tuple(page for page in swap.pages if page not in gone)
        self._present[model] += len(arrived)
        self._log_swap(model, swap.transfer, swap.transfer.arrived, cancelled=True)
        self._let_go(model)
        self._pipeline.go_on()
        if self._observer is not None:
            self._observer.pages_came(self.number, model, len(arrived))
        self._tell(SwapCancelled(model, swap.pages, arrived))

    def _log_swap(self, model: str, transfer: Transfer, frames: int, *, cancelled: bool) -> None:
        epoch = self._future.begin
        ordered, ended = transfer.ordered - epoch, self._clock.now - epoch
        complete = self._present[model] == self._page_counts[model]
        self._log.swaps.append(
            SwapRow(self.number, model, ordered, ended, transfer.busy, frames, transfer.urgency, cancelled, complete)
        )

    def _evict(self, action: Evict) -> None:
        model, now = action.model, self._clock.now
        self._present[model] -= len(action.pages)
        frames = self._contents.give(model, action.pages, len(action.pages))
        written = 0.0
        if self._surroundings.write_back:
            written = frames * self._link.frame_seconds
            self._link.write_back(frames, lambda transfer: None)
        if self._observer is not None:
            self._observer.pages_left(self.number, model, len(action.pages))
        self._log.evictions.append(EvictionRow(self.number, model, now - self._future.begin, frames, written))

    # Steps

    def _run(self, action: Run) -> None:
        name = action.model
        model, now = self._models[name], self._clock.now
        prompt = context = 0
        seconds: float | None = None
        for request in action.requests:
            live = self.live[request]
            if live.holds_cache:
                context += live.tokens
            else:
                prompt += live.tokens
                live.holds_cache = True
                if request >= 0 and self._log.started[request] != self._log.started[request]:
                    self._log.started[request] = now - self._future.begin
            if live.arrival.seconds is not None:
                seconds = (seconds or 0.0) + live.arrival.seconds / live.steps
        if seconds is None:
            seconds = model.step.seconds(len(action.requests), prompt, context)
        told = model.overlaps and not model.continuous and not self._surroundings.silent_stages
        freed = self._stage_freed if told else None
        step = VirtualStep(name, action.requests, now, seconds, None, self._step_ended, freed)
        self._steps.setdefault(name, deque()).append(step)
        if self._surroundings.steps_behind_copies and self._swaps:
            self._held.append((step, set(self._swaps)))
        elif name not in self._swaps:
            step.arrivals = ()
        self._pipeline.start(step)

    def _stage_freed(self, step: VirtualStep) -> None:
        self._tell_later(StageFreed(step.model))

    def _step_ended(self, step: VirtualStep) -> None:
        now, steps = self._clock.now, self._steps[step.model]
        assert steps.popleft() is step
        if not steps:
            del self._steps[step.model]
        epoch = self._future.begin
        self._log.steps.append(
            StepRow(self.number, step.model, step.begun - epoch, now - epoch, step.compute, len(step.requests))
        )
        continuous = self._models[step.model].continuous
        answered = now + self._hardware.answer_overhead - epoch
        finished = []
        blocks: dict[int, int] = {}
        for request in step.requests:
            live = self.live[request]
            live.left -= 1
            live.tokens += 1
            live.seconds += step.compute
            if request >= 0 and self._log.first_token[request] != self._log.first_token[request]:
                self._log.first_token[request] = answered
            if live.left == 0:
                finished.append(request)
                del self.live[request]
                if request >= 0:
                    self._log.finished[request] = answered
                if self._observer is not None:
                    self._observer.request_ended(self.number, step.model, live.seconds)
            elif continuous:
                blocks[request] = self._blocks(live.tokens)
        self._tell_later(StepFinished(step.model, tuple(finished), step.compute, blocks))

    def _tell_later(self, event: StageFreed | StepFinished) -> None:
        """The scheduler hears of steps when the group does."""
        overhead = self._hardware.step_overhead
        if overhead:
            self._clock.at(self._clock.now + overhead, self._tell, event)
        else:
            self._tell(event)
