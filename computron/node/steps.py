"""The steps under way, at most one of each model: started, ended, and turned into what the scheduler is told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence

from computron.errors import GroupBroken, SwapFailed
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


class Steps:
    """`tell`: how a step ended, for the scheduler. `failed`: the device can do nothing more."""

    def __init__(self, requests: Requests, tell: Callable[[events.Event], None], failed: Callable[[str], None]) -> None:
        self._requests = requests
        self._tell = tell
        self._failed = failed
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by model
        self._dropped: dict[str, set[int]] = {}  # requests that ended while their model's step runs
        self._aborts: dict[str, int] = {}  # steps in a row of each model that came to nothing
        self._busy = BusyClock()
        self._context = contextvars.copy_context()  # of no request: log lines of steps name none

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def drop_after(self, handle: RequestHandle) -> bool:
        """Whether a step of the request's model runs; its executor lets go of the request after it."""
        if handle.model not in self._tasks:
            return False
        self._dropped.setdefault(handle.model, set()).add(handle.number)
        return True

    async def wait(self) -> None:
        """Until all steps that are under way have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    def start(self, crew: Crew, action: Run) -> events.Event | None:
        """Start a step; gives the event if it ended before it began."""
        # The gate is taken now: between now and the task's start, a swap of the model may fail.
        try:
            gate = crew.begin_step(action.model)
        except SwapFailed as error:
            return self._aborted(action, error)
        self._requests.begin_step(action.requests)
        run = self._run(crew, action, gate)
        self._tasks[action.model] = asyncio.get_running_loop().create_task(run, context=self._context)
        return None

    async def _run(self, crew: Crew, action: Run, gate: MeasuredGate) -> None:
        model = action.model
        event: events.Event | None
        try:
            result, seconds = await crew.run(action, gate)
        except SwapFailed as error:
            event = self._aborted(action, error)
        except GroupBroken as error:
            log.warning("step_lost model=%s error=%s", model, error)
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
        del self._tasks[model]
        for number in self._dropped.pop(model, ()):
            crew.models[model].executor.drop(number)
        if event is not None:
            self._tell(event)

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
        """Share of this time in which steps computed; `running`: intervals of those under way, in order."""
        return self._busy.hidden_share(began, ended, running)
