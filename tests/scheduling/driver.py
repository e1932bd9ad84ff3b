"""A device that exists only in numbers: carries out the scheduler's actions on a virtual clock and distrusts each one.

Nothing of the scheduler's own bookkeeping is used here, so that a mistake there cannot hide itself.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

from virtual_device import PAGE_SECONDS, Device, Live, RunningStep

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
    Event,
    ModelAdded,
    ModelSpec,
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
)
from computron.scheduling.scheduler import Scheduler

FRAME_BYTES = 1_000_000
BANDWIDTH = FRAME_BYTES / PAGE_SECONDS


class Driver:
    """`at(time, event)` plans events, `drain()` runs until nothing is left to happen."""

    def __init__(
        self,
        frames: int,
        specs: list[ModelSpec],
        *,
        step_seconds: float | dict[str, float] = 0.05,
        step_limit: int = 20_000,
        tells_stages: bool = True,
        max_steps_in_flight: int = 1,
        **scheduler: object,
    ) -> None:
        scheduler["max_steps_in_flight"] = self.stages = max_steps_in_flight
        self.scheduler = Scheduler(frames=frames, frame_bytes=FRAME_BYTES, link_bandwidth_hint=BANDWIDTH, **scheduler)
        self.device = Device(frames)
        self.now = 0.0
        self.actions: list[tuple[float, Action]] = []
        self.live: dict[int, Live] = {}
        self.outcomes: dict[int, str] = {}
        self.waits: dict[int, float] = {}
        self.steps: dict[str, list[RunningStep]] = {}  # of each model, in order
        self.failing_swaps: set[int] = set()  # by the number of the transfer
        self.failing_steps: set[int] = set()  # by the number of the step
        self.steps_needed: dict[int, int] = {}
        self.growth: dict[int, int] = {}
        self.longest_step = 0.0
        self.on_run: Callable[[str, tuple[int, ...]], None] = lambda model, requests: None
        self._seconds = step_seconds
        self._tells_stages = tells_stages and max_steps_in_flight > 1
        self._planned: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()
        self._transfer_number = itertools.count()
        self._step_number = itertools.count()
        self._wake: float | None = None
        self._moved_until = 0.0
        self._events_left = step_limit
        for spec in specs:
            self.tell(ModelAdded(spec))

    # What tests say

    def at(self, time: float, event: Event) -> None:
        heapq.heappush(self._planned, (time, next(self._numbers), event))

    def arrive(
        self,
        request: int,
        model: str,
        time: float = 0.0,
        *,
        steps: int = 1,
        growth: int = 0,
        priority: int = 0,
        deadline: float | None = None,
        blocks: int = 0,
    ) -> None:
        self.steps_needed[request] = steps
        self.growth[request] = growth
        self.at(time, RequestArrived(Request(request, model, time, priority, deadline, blocks)))

    def cancel(self, request: int, time: float) -> None:
        self.at(time, RequestCancelled(request))

    def of(self, kind: type[Action]) -> list[Action]:
        return [action for _, action in self.actions if isinstance(action, kind)]

    def runs(self) -> list[str]:
        """The models that ran, in order, repeated runs of one model told once."""
        return [name for name, _ in itertools.groupby(run.model for run in self.of(Run))]

    def run_until(self, time: float) -> None:
        while (following := self._next_time()) is not None and following <= time:
            self._advance(following)
        self._move_link(time)
        self.now = time

    def drain(self) -> None:
        """Let everything happen that can happen, and then demand that nothing was lost."""
        while (following := self._next_time()) is not None:
            self._advance(following)
        assert not self.live, f"requests were lost: {self.live}"
        assert not self.steps
        assert not self.device.transfers
        assert not any(self.device.cache.values()), "a cache was not given back"

    def tell(self, event: Event) -> None:
        self._events_left -= 1
        assert self._events_left > 0, "no progress: too many events"
        self._note(event)
        for action in self.scheduler.handle(event, self.now):
            self.actions.append((self.now, action))
            self._perform(action)
        self.scheduler.check()
        assert self.scheduler.free_frames == self.device.free
        for name, pages in self.device.mapped.items():
            count = len(self.device.specs[name].pages)
            assert self.scheduler.resident_fraction(name) == (len(pages) / count if count else 1.0)

    # The clock

    def _next_time(self) -> float | None:
        times = [self._planned[0][0]] if self._planned else []
        if self._wake is not None:
            times.append(self._wake)
        transfer = self._on_link()
        if transfer is not None:
            times.append(max(self.now, self._moved_until + self.device.transfers[transfer].left))
        times += [time for steps in self.steps.values() for step in steps for time in step.times]
        return min(times) if times else None

    def _advance(self, time: float) -> None:
        """Everything that happens at this time, one event after the other."""
        self._move_link(time)
        self.now = time
        for name in [name for name, transfer in self.device.transfers.items() if transfer.left <= 1e-9]:
            self._end_transfer(name)
        for name, steps in list(self.steps.items()):
            for step in steps[:]:
                self._move_step(name, step, time + 1e-9)
        while self._planned and self._planned[0][0] <= time:
            self.tell(heapq.heappop(self._planned)[2])
        if self._wake is not None and self._wake <= time:
            self._wake = None
            self.tell(TimePassed())

    # The link

    def _on_link(self) -> str | None:
        """The model whose transfer moves now."""
        waiting = self.device.transfers
        return min(waiting, key=lambda name: (waiting[name].urgency, waiting[name].number)) if waiting else None

    def _move_link(self, time: float) -> None:
        """No transfer ends before `time`, so that one alone has moved."""
        name = self._on_link()
        if name is not None:
            transfer = self.device.transfers[name]
            transfer.left = max(0.0, transfer.left - (time - self._moved_until))
        self._moved_until = time

    def _end_transfer(self, name: str) -> None:
        transfer = self.device.transfers.pop(name)
        if transfer.cancelled:
            self.tell(SwapCancelled(name, transfer.pages, self.device.keep_what_came(name, transfer)))
        elif transfer.fails:
            (step,) = self.steps.pop(name, [None])  # a second one waits for no pages
            if step is None:
                self.tell(SwapFailed(name, transfer.pages))
            elif transfer.number % 2:
                self.tell(SwapFailed(name, transfer.pages))
                self._abort(name, step)
            else:
                self.device.transfers[name] = transfer  # its end has not been told yet
                self._abort(name, step)
                del self.device.transfers[name]
                self.tell(SwapFailed(name, transfer.pages))
        else:
            self.device.mapped[name] |= set(transfer.pages)
            for step in self.steps.get(name, ()):
                step.compute_begins = self.now
            self.tell(SwapFinished(name, transfer.pages, self.now - transfer.ordered))

    # Steps

    def _move_step(self, name: str, step: RunningStep, time: float) -> None:
        if len(step.times) > 1 and step.times[0] <= time:
            step.freed = True
            self.tell(StageFreed(name))
        if step.times and step.times[-1] <= time:
            self._end_step(name, step)

    def _end_step(self, name: str, step: RunningStep) -> None:
        assert self.steps[name].pop(0) is step
        if not self.steps[name]:
            del self.steps[name]
        if next(self._step_number) in self.failing_steps:
            self._end_requests(step.requests, "failed")
            self.tell(StepFailed(name, step.requests))
            return
        finished, going_on = [], {}
        for request in step.requests:
            live = self.live.get(request)
            if live is None:
                continue  # cancelled while it ran
            live.steps_left -= 1
            live.waiting_since = self.now
            if live.steps_left <= 0 or not self.device.specs[name].continuous:
                finished.append(request)
            else:
                live.blocks += live.growth
                going_on[request] = live.blocks
        self._end_requests(tuple(finished), "finished")
        self.tell(StepFinished(name, tuple(finished), step.seconds, going_on))

    def _abort(self, name: str, step: RunningStep) -> None:
        for request in step.opened:
            if request in self.live:
                self.live[request].holds_cache = False
                self.live[request].started = None
        self.tell(StepAborted(name))

    def _end_requests(self, requests: tuple[int, ...], outcome: str) -> None:
        for request in requests:
            if self.live.pop(request, None) is not None:
                self.outcomes[request] = outcome

    # Events, noted before the scheduler hears them

    def _note(self, event: Event) -> None:
        if isinstance(event, ModelAdded):
            self.device.add(event.spec)
        elif isinstance(event, RequestArrived):
            request = event.request
            assert request.id not in self.outcomes
            self.live[request.id] = Live(
                request,
                self.steps_needed.get(request.id, 1),
                self.growth.get(request.id, 0),
                request.cache_blocks,
                waiting_since=self.now,
            )
        elif isinstance(event, RequestCancelled):
            self._end_requests((event.request,), "cancelled")

    # Actions, each one checked before it is carried out

    def _perform(self, action: Action) -> None:
        match action:
            case SwapIn():
                number = next(self._transfer_number)
                self.device.bring(action, number, self.now, fails=number in self.failing_swaps)
            case RaiseUrgency(model, urgency):
                assert not self.device.transfers[model].cancelled
                self.device.transfers[model].urgency = urgency
            case CancelSwap(model):
                assert model not in self.steps, "a step waits for these pages"
                self.device.transfers[model].cancel()
            case Evict():
                assert action.model not in self.steps, "pages of a running model were evicted"
                self.device.evict(action)
            case SetCache(model, frames):
                assert model not in self.steps, "the cache of a running model was changed"
                assert frames >= 0
                self.device.cache[model] = frames
                assert self.device.free >= 0, "frames are over-committed"
                self._check_cache(model)
            case Preempt(model, request):
                live = self.live[request]
                assert live.request.model == model
                assert live.holds_cache or not self.device.specs[model].blocks_per_frame
                assert all(request not in step.requests for step in self.steps.get(model, ()))
                self._check_not_the_oldest(live)
                live.holds_cache = False
            case Run():
                self._run(action)
            case Reject(request, _, reason):
                assert request in self.live
                assert all(request not in step.requests for steps in self.steps.values() for step in steps)
                self._end_requests((request,), reason.value)
            case WakeAt(time):
                assert time > self.now
                self._wake = time

    def _run(self, action: Run) -> None:
        device, name = self.device, action.model
        spec = device.specs[name]
        before = self.steps.setdefault(name, [])
        assert all(step.freed for step in before), "two steps of one model on a stage"
        assert not before or not (spec.continuous or spec.blocks_per_frame), "two steps of one sequence"
        assert sum(map(len, self.steps.values())) < self.stages, "more steps than the device takes"
        assert action.requests
        assert len(set(action.requests)) == len(action.requests) <= spec.max_batch_size
        transfer = device.transfers.get(name)
        on_the_way = set(transfer.pages) if transfer is not None and not transfer.cancelled else set()
        assert device.mapped[name] | on_the_way == set(range(len(spec.pages))), "a run starts without its pages"
        opened = tuple(request for request in action.requests if not self.live[request].holds_cache)
        for request in action.requests:
            live = self.live[request]
            assert live.request.model == name
            live.holds_cache = True
            if live.started is None:
                live.started = self.now
                self.waits[request] = self.now - live.request.arrival
        self._check_cache(name)
        self.on_run(name, action.requests)
        seconds = self._seconds if isinstance(self._seconds, float) else self._seconds[name]
        self.longest_step = max(self.longest_step, seconds)
        begins = None if on_the_way else self.now
        stage = seconds / self.stages if self._tells_stages else math.inf
        before.append(RunningStep(action.requests, seconds, stage, opened, begins))

    def _check_not_the_oldest(self, preempted: Live) -> None:
        """The oldest sequence on the device keeps its cache, or two could take it from each other for ever."""
        if any(
            request not in self.live for steps in self.steps.values() for step in steps for request in step.requests
        ):
            return  # one whose client has left holds its place until its step ends
        holders = [
            live
            for live in self.live.values()
            if live.holds_cache and self.device.specs[live.request.model].blocks_per_frame
        ]
        assert preempted is not min(holders, key=lambda live: (live.request.arrival, live.request.id))

    def _check_cache(self, name: str) -> None:
        spec = self.device.specs[name]
        if spec.blocks_per_frame:
            held = sum(live.blocks for live in self.live.values() if live.request.model == name and live.holds_cache)
            room = math.floor(self.device.cache[name] * spec.blocks_per_frame)
            assert held <= room, f"{name} holds {held} blocks, its cache has room for {room}"
