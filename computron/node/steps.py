"""The steps under way: started, ended, and turned into what the scheduler is told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from computron.errors import GroupBroken, StepLost, SwapFailed
from computron.node.busy import BusyClock, Interval
from computron.node.crew import Crew
from computron.node.handle import RequestHandle
from computron.node.measured_gate import MeasuredGate
from computron.node.requests import Requests
from computron.scheduling import events
from computron.scheduling.actions import Run

log = logging.getLogger(__name__)

# Steps of a model in a row that came to nothing, before their requests are told; more than swaps are retried.
MAX_ABORTS = 5


@dataclass(slots=True, eq=False)
class _Step:
    """`task`: runs it; None if it ended before it began. `event`: what the scheduler shall hear of its end.

    `dropped`: requests that ended while it was its model's last one under way.
    """

    task: asyncio.Task[None] | None = None
    ended: bool = False
    event: events.Event | None = None
    dropped: set[int] = field(default_factory=set)


class Steps:
    """`tell`: what becomes of steps, for the scheduler. `failed`: the device can do nothing more.

    The scheduler hears of the ends of a model's steps in the order in which it ordered them. Where a later one ends
    first, because it failed early, its requests hear of that at once all the same.
    """

    def __init__(self, requests: Requests, tell: Callable[[events.Event], None], failed: Callable[[str], None]) -> None:
        self._requests = requests
        self._tell = tell
        self._failed = failed
        self._under_way: dict[str, deque[_Step]] = {}  # of each model, in the order in which they were ordered
        self._aborts: dict[str, int] = {}  # steps in a row of each model that came to nothing
        self._busy = BusyClock()
        self._context = contextvars.copy_context()  # of no request: log lines of steps name none

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def drop_after(self, handle: RequestHandle) -> bool:
        """Whether a step of the request's model runs; its executor lets go of the request after the last one."""
        steps = self._under_way.get(handle.model)
        if not steps:
            return False
        steps[-1].dropped.add(handle.number)
        return True

    async def wait(self) -> None:
        """Until all steps that are under way have ended."""
        tasks = [step.task for steps in self._under_way.values() for step in steps if step.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    def start(self, crew: Crew, action: Run) -> events.Event | None:
        """Start a step; gives the event if it ended before it began, and no other step of the model is under way."""
        model = action.model
        # The gate is taken now: between now and the task's start, a swap of the model may fail.
        try:
            gate = crew.begin_step(model)
        except SwapFailed as error:
            event = self._aborted(action, error)
            if model not in self._under_way:
                return event
            self._under_way[model].append(_Step(ended=True, event=event))
            return None
        self._requests.begin_step(action.requests)
        step = _Step()
        run = self._run(crew, action, gate, step)
        step.task = asyncio.get_running_loop().create_task(run, context=self._context)
        self._under_way.setdefault(model, deque()).append(step)
        return None

    async def _run(self, crew: Crew, action: Run, gate: MeasuredGate, step: _Step) -> None:
        model = action.model
        event: events.Event | None
        try:
            result, seconds = await crew.run(action, gate, lambda: self._stage_freed(crew, model))
        except SwapFailed as error:
            event = self._aborted(action, error)
        except GroupBroken as error:
            log.warning("step_lost model=%s error=%s", model, error)
            if not isinstance(error, StepLost):
                self._requests.lose_step(action.requests, error)
            event = None  # the scheduler that ordered it is gone
        except Exception as error:
            log.exception("step_failed model=%s requests=%s", model, self._names(action.requests))
            self._requests.fail(action.requests, error)
            event = events.StepFailed(model, action.requests)
            reason = crew.device_error()
            if reason is not None:
                self._failed(reason)
        else:
            self._aborts.pop(model, None)
            self._requests.deliver(model, result, seconds)
            event = events.StepFinished(model, result.finished, seconds, result.cache_blocks)
        self._busy.add(gate.computing(time.monotonic()))
        step.ended, step.event = True, event
        for told in self._ended(crew, model):
            self._tell(told)

    def _stage_freed(self, crew: Crew, model: str) -> None:
        if crew.models[model].executor.overlaps:
            self._tell(events.StageFreed(model))

    def _ended(self, crew: Crew, model: str) -> list[events.Event]:
        """Forget those of the model's first steps that have ended; gives what is to be told of them."""
        told = []
        steps = self._under_way[model]
        while steps and steps[0].ended:
            step = steps.popleft()
            for number in step.dropped:
                crew.models[model].executor.drop(number)
            if step.event is not None:
                told.append(step.event)
        if not steps:
            del self._under_way[model]
        return told

    def _aborted(self, action: Run, error: SwapFailed) -> events.Event:
        """The step came to nothing. Its requests wait again, unless that has happened too often in a row."""
        aborts = self._aborts[action.model] = self._aborts.get(action.model, 0) + 1
        log.warning("step_aborted model=%s times=%d error=%s", action.model, aborts, error)
        if aborts < MAX_ABORTS:
            return events.StepAborted(action.model)
        del self._aborts[action.model]
        self._requests.fail(action.requests, error)
        return events.StepFailed(action.model, action.requests)

    def _names(self, numbers: Sequence[int]) -> str:
        handles = (self._requests.get(number) for number in numbers)
        return ",".join(handle.request_id for handle in handles if handle is not None)

    def hidden_share(self, began: float, ended: float, running: Sequence[Interval]) -> float:
        """Share of this time in which steps computed; `running`: intervals of those under way."""
        return self._busy.hidden_share(began, ended, running)
