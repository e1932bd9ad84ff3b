"""The requests that are here: opened, fed with outputs, ended once, whatever the reason, and counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from computron.errors import BadRequest, ComputronError, ExecutionFailed, GroupBroken
from computron.execution.requests import FailedOutput, StepResult, TextOutput
from computron.memory.swapper import SwapOutcome
from computron.metrics import Metrics
from computron.node.handle import RequestHandle
from computron.node.rejections import RETRY_AFTER
from computron.scheduling.events import Request

log = logging.getLogger(__name__)

MAX_LOST_STEPS = 3  # in a row, of one request


class Requests:
    """`forget(handle)` is called when a request has ended, so that its model's executor lets go of it."""

    def __init__(self, metrics: Metrics, forget: Callable[[RequestHandle], None]) -> None:
        self._metrics = metrics
        self._forget = forget
        self._handles: dict[int, RequestHandle] = {}
        self._asked: dict[int, Request] = {}  # what the scheduler was told of each
        self.idle = asyncio.Event()  # set while there are none
        self.idle.set()

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[RequestHandle]:
        return iter(list(self._handles.values()))

    def get(self, number: int) -> RequestHandle | None:
        return self._handles.get(number)

    def open(self, handle: RequestHandle, request: Request) -> None:
        """`request`: as the scheduler is told of it."""
        self._handles[handle.number] = handle
        self._asked[handle.number] = request
        self.idle.clear()

    def waiting(self) -> list[tuple[RequestHandle, Request]]:
        """All that have not ended, in the order in which they came."""
        return [(handle, self._asked[number]) for number, handle in sorted(self._handles.items())]

    def end(self, handle: RequestHandle, *, outcome: str, error: ComputronError | None = None) -> None:
        """The request is over: tell its reader, count it, forget it. Nothing happens if it has ended before."""
        if self._handles.pop(handle.number, None) is None:
            return
        del self._asked[handle.number]
        now = time.monotonic()
        handle.finish(now, error)
        self._metrics.request_finished(handle.model, outcome, now - handle.arrival)
        self._forget(handle)
        if not self._handles:
            self.idle.set()

    def end_all(self, error: ComputronError) -> None:
        for handle in self:
            self.end(handle, outcome="error", error=error)

    def fail(self, numbers: Iterable[int], error: Exception) -> None:
        """These requests were in a step that raised."""
        reason = error if isinstance(error, ComputronError) else ExecutionFailed(f"the model failed: {error}")
        for number in numbers:
            handle = self._handles.get(number)
            if handle is not None:
                self.end(handle, outcome="error", error=reason)

    def lose_step(self, numbers: Iterable[int], error: GroupBroken) -> None:
        """The group broke while it computed these. Whatever does that again and again shall not be tried for ever."""
        for number in numbers:
            handle = self._handles.get(number)
            if handle is None:
                continue
            handle.lost_steps += 1
            if handle.lost_steps >= MAX_LOST_STEPS:
                words = f"the group broke {handle.lost_steps} times while it computed this request: {error.message}"
                self.end(handle, outcome="error", error=GroupBroken(words, retry_after=RETRY_AFTER))

    def begin_step(self, numbers: Iterable[int]) -> None:
        """These requests are computed now, some for the first time."""
        now = time.monotonic()
        for number in numbers:
            handle = self._handles.get(number)
            if handle is not None and handle.timings.queue_seconds is None:
                handle.timings.queue_seconds = now - handle.arrival

    def deliver(self, model: str, result: StepResult, seconds: float) -> None:
        """Hand out what a step gave, which computed for so long. Requests cancelled meanwhile are passed over."""
        now = time.monotonic()
        self._metrics.step(model, result.batch_size, seconds)
        for output in result.outputs:
            handle = self._handles.get(output.request)
            if handle is None:
                continue
            handle.lost_steps = 0
            if isinstance(output, FailedOutput):
                log.error("request_failed request_id=%s model=%s error=%s", handle.request_id, model, output.message)
                error = BadRequest(output.message) if output.refused else ExecutionFailed(output.message)
                self.end(handle, outcome="error", error=error)
                continue
            if handle.last_output is None:
                handle.timings.first_output_seconds = now - handle.arrival
                if isinstance(output, TextOutput):
                    self._metrics.first_token(model, now - handle.arrival)
            elif isinstance(output, TextOutput):
                self._metrics.inter_token(model, now - handle.last_output)
            handle.last_output = now
            handle.put(output)
        for number in result.finished:
            handle = self._handles.get(number)
            if handle is not None:
                self.end(handle, outcome="ok")

    def charge_swap(self, outcome: SwapOutcome) -> None:
        """Requests that waited for this swap-in tell so in their timings."""
        now = time.monotonic()
        for handle in self._handles.values():
            if handle.model == outcome.image_id and handle.last_output is None:
                handle.timings.swap_seconds += min(outcome.seconds, now - handle.arrival)
                handle.timings.swap_bytes += outcome.bytes_moved
