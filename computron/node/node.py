"""The node: requests and transfers in, scheduler's actions out.

The main loop is `_handle`: every event goes to the scheduler, every action it gives is performed at once. Nothing here
decides; nothing in the scheduler does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping

from computron.config import Config
from computron.errors import ComputronError, ExecutionFailed, ModelNotFound, SwapFailed, Unavailable
from computron.execution.requests import FailedOutput, Job, StepResult, TextOutput
from computron.memory.swapper import SwapOutcome
from computron.metrics import Metrics
from computron.models.plan import plan_model
from computron.node.busy import BusyClock
from computron.node.handle import RequestHandle
from computron.node.rejections import RETRY_AFTER, rejection
from computron.node.snapshot import NodeSnapshot, NodeState, take_snapshot
from computron.node.worker import Progress, ServedModel, Step, Worker
from computron.scheduling import actions, events
from computron.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)


class Node:
    """One process that serves its models from one device. All methods belong to the event loop's thread."""

    def __init__(self, config: Config, metrics: Metrics | None = None) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.state = NodeState.STARTING
        self.failure: str | None = None
        self._worker: Worker | None = None
        self._scheduler: Scheduler | None = None
        self._handles: dict[int, RequestHandle] = {}
        self._next_number = 0
        self._events: deque[events.Event] = deque()
        self._handling = False
        self._dropped: dict[str, set[int]] = {}  # cancelled while their model's step runs; dropped after it
        self._step: asyncio.Task[None] | None = None
        self._stepping: str | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._busy = BusyClock()
        self._swap_errors: dict[str, str] = {}  # the last one of each model
        self._idle = asyncio.Event()
        self._idle.set()

    # Lifecycle

    async def startup(self, progress: Progress | None = None) -> None:
        """Load every model into the host store and start to take requests.

        Raises ConfigError or CheckpointError, naming the model, if one of them cannot be served.
        """
        loop = asyncio.get_running_loop()
        worker = self._worker = Worker(self.config)
        self._scheduler = Scheduler(
            frames=worker.frames,
            frame_bytes=worker.page_bytes,
            policy=self.config.scheduler.policy,
            max_wait=self.config.scheduler.max_wait,
            prefetch=self.config.scheduler.prefetch,
            link_bandwidth_hint=worker.link_bandwidth_hint,
        )
        plans = [await loop.run_in_executor(None, plan_model, model) for model in self.config.models]
        for plan in plans:
            await loop.run_in_executor(None, worker.load, plan, progress)
        loop.add_reader(worker.completions_fd, self._on_transfers)
        for served in worker.models.values():
            self._handle(events.ModelAdded(self._spec(served)))
        self.state = NodeState.READY

    async def shutdown(self, drain: float) -> None:
        """Take no more requests, give those that are here `drain` seconds to end, then end the rest with an error."""
        if self.state is NodeState.READY:
            self.state = NodeState.DRAINING
            try:
                async with asyncio.timeout(drain):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("drain_timeout requests=%d", len(self._handles))
        self._end_all(Unavailable("the server is shutting down", retry_after=RETRY_AFTER))
        await self._close()

    async def _close(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        worker, self._worker = self._worker, None
        if worker is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(worker.completions_fd)
        worker.cancel_transfers()
        if self._step is not None:
            await asyncio.wait([self._step])
        await loop.run_in_executor(None, worker.close)

    # Requests

    @property
    def ready(self) -> bool:
        return self.state is NodeState.READY

    @property
    def models(self) -> Mapping[str, ServedModel]:
        return self._worker.models if self._worker is not None else {}

    def model(self, model: str) -> ServedModel:
        """The model of that id. Raises ModelNotFound, or Unavailable while the node starts or has failed."""
        if self._worker is None or self.state in (NodeState.STARTING, NodeState.FAILED):
            raise Unavailable(self._why_unavailable(), retry_after=RETRY_AFTER)
        served = self._worker.models.get(model)
        if served is None:
            raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
        return served

    def submit(
        self, model: str, job: Job, *, request_id: str, priority: int = 0, deadline: float | None = None
    ) -> RequestHandle:
        """Queue one job. `deadline`: seconds from now by which it must have started.

        Raises ModelNotFound, BadRequest, ContextTooLong, QueueFull, OutOfMemory or Unavailable; errors that come later
        are raised from the handle's iteration.
        """
        served = self.model(model)
        if not self.ready:
            raise Unavailable(self._why_unavailable(), retry_after=RETRY_AFTER)
        blocks = served.executor.prepare(job)
        now = time.monotonic()
        number = self._next_number
        self._next_number += 1
        handle = RequestHandle(number, request_id, model, now, self._cancel)
        self._handles[number] = handle
        self._idle.clear()
        served.executor.add(number, job)
        request = events.Request(
            id=number,
            model=model,
            arrival=now,
            priority=priority + served.plan.config.priority,
            deadline=None if deadline is None else now + deadline,
            cache_blocks=blocks,
        )
        self._handle(events.RequestArrived(request))
        return handle

    def load(self, model: str) -> None:
        """Bring the model to the device when nothing more urgent needs the room."""
        self.model(model)
        self._handle(events.LoadAsked(model))

    def unload(self, model: str) -> None:
        """Take the model off the device once it is idle."""
        self.model(model)
        self._handle(events.UnloadAsked(model))

    def _cancel(self, handle: RequestHandle) -> None:
        self._end(handle, outcome="cancelled")
        self._handle(events.RequestCancelled(handle.number))

    def _end(self, handle: RequestHandle, *, outcome: str, error: ComputronError | None = None) -> None:
        """The request is over, whatever the reason: tell its reader, count it, forget it."""
        now = time.monotonic()
        handle.finish(now, error)
        del self._handles[handle.number]
        if not self._handles:
            self._idle.set()
        self.metrics.request_finished(handle.model, outcome, now - handle.arrival)
        if self._worker is None:
            return
        if self._stepping == handle.model:
            self._dropped.setdefault(handle.model, set()).add(handle.number)
        else:
            self._worker.models[handle.model].executor.drop(handle.number)

    def _end_all(self, error: ComputronError) -> None:
        for handle in list(self._handles.values()):
            self._end(handle, outcome="error", error=error)

    def _why_unavailable(self) -> str:
        match self.state:
            case NodeState.STARTING:
                return "the server is starting: its models are being loaded"
            case NodeState.FAILED:
                return f"the device has failed: {self.failure}; the server must be restarted"
            case _:
                return "the server is shutting down"

    # The main loop

    def _handle(self, event: events.Event) -> None:
        """Tell the scheduler, and do what it says. Events that actions cause wait until all its actions are done."""
        self._events.append(event)
        if self._handling or self._scheduler is None:
            return
        self._handling = True
        try:
            while self._events:
                for action in self._scheduler.handle(self._events.popleft(), time.monotonic()):
                    self._perform(action)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._handling = False

    def _perform(self, action: actions.Action) -> None:
        worker = self._worker
        if worker is None:
            return
        match action:
            case actions.Run():
                self._stepping = action.model
                self._step = asyncio.get_running_loop().create_task(self._run(worker, action))
            case actions.Reject():
                self._reject(action)
            case actions.WakeAt():
                self._wake_at(action.time)
            case actions.SwapIn():
                self._busy.swap_began(action.model, self._compute_seconds())
                try:
                    worker.perform(action)
                except SwapFailed as error:
                    log.error("swap_in_refused model=%s error=%s", action.model, error)
                    self._swap_errors[action.model] = str(error)
                    self._events.append(events.SwapFailed(action.model, action.pages))
            case actions.Evict():
                worker.perform(action)
                self.metrics.eviction(action.model, action.reason.value, len(action.pages))
            case actions.RaiseUrgency() | actions.CancelSwap() | actions.SetCache() | actions.Preempt():
                worker.perform(action)

    def _reject(self, action: actions.Reject) -> None:
        handle = self._handles.get(action.request)
        if handle is not None:
            self._end(handle, outcome="rejected", error=rejection(action, self._swap_errors.get(action.model)))

    def _wake_at(self, moment: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        delay = max(0.0, moment - time.monotonic())
        self._wake = asyncio.get_running_loop().call_later(delay, self._handle, events.TimePassed())

    # Steps

    async def _run(self, worker: Worker, action: actions.Run) -> None:
        model = action.model
        now = time.monotonic()
        for number in action.requests:
            handle = self._handles.get(number)
            if handle is not None and handle.timings.queue_seconds is None:
                handle.timings.queue_seconds = now - handle.arrival
        self._busy.step_began(now)
        event: events.Event
        try:
            step = await worker.run(action)
        except SwapFailed as error:
            log.warning("step_aborted model=%s error=%s", model, error)
            self._busy.step_ended(time.monotonic(), waited=0.0)
            event = events.StepAborted(model)
        except Exception as error:
            log.exception("step_failed model=%s", model)
            self._busy.step_ended(time.monotonic(), waited=0.0)
            failed = action.requests
            self._fail_requests(failed, error)
            event = events.StepFailed(model, failed)
        else:
            self._busy.step_ended(step.started + step.seconds, step.waited)
            self._deliver(model, step)
            event = events.StepFinished(
                model, step.result.finished, step.seconds - step.waited, step.result.cache_blocks
            )
        self._step_over(worker, model)
        self._handle(event)

    def _step_over(self, worker: Worker, model: str) -> None:
        self._stepping = None
        self._step = None
        for number in self._dropped.pop(model, ()):
            worker.models[model].executor.drop(number)

    def _fail_requests(self, numbers: tuple[int, ...], error: Exception) -> None:
        for number in numbers:
            handle = self._handles.get(number)
            if handle is not None:
                reason = error if isinstance(error, ComputronError) else ExecutionFailed(f"the model failed: {error}")
                self._end(handle, outcome="error", error=reason)

    def _deliver(self, model: str, step: Step) -> None:
        now = time.monotonic()
        result: StepResult = step.result
        self.metrics.batch(model, result.batch_size)
        for output in result.outputs:
            handle = self._handles.get(output.request)
            if handle is None:
                continue
            if isinstance(output, FailedOutput):
                self._end(handle, outcome="error", error=ExecutionFailed(output.message))
                continue
            if handle.last_output is None:
                handle.timings.first_output_seconds = now - handle.arrival
                if isinstance(output, TextOutput):
                    self.metrics.first_token(model, now - handle.arrival)
            elif isinstance(output, TextOutput):
                self.metrics.inter_token(model, now - handle.last_output)
            handle.last_output = now
            handle.put(output)
        for number in result.finished:
            handle = self._handles.get(number)
            if handle is not None:
                self._end(handle, outcome="ok")

    # Transfers

    def _on_transfers(self) -> None:
        if self._worker is None:
            return
        for outcome in self._worker.completions():
            self._handle(self._swap_event(outcome))
        reason = self._worker.backend.failed if self._worker is not None else None
        if reason is not None and self.state is not NodeState.FAILED:
            self._fail(reason)

    def _swap_event(self, outcome: SwapOutcome) -> events.Event:
        model = outcome.image_id
        match outcome.state:
            case "done":
                hidden = self._busy.swap_ended(model, outcome.seconds, self._compute_seconds())
                self.metrics.swap_finished(model, outcome.seconds, hidden, outcome.bytes_moved)
                for handle in self._handles.values():
                    if handle.model == model and handle.last_output is None:
                        handle.timings.swap_seconds += outcome.seconds
                        handle.timings.swap_bytes += outcome.bytes_moved
                log.info(
                    "swap_in model=%s pages=%d bytes=%d seconds=%.4f",
                    model, len(outcome.pages), outcome.bytes_moved, outcome.seconds,
                )  # fmt: skip
                return events.SwapFinished(model, outcome.pages, outcome.seconds)
            case "cancelled":
                return events.SwapCancelled(model, outcome.pages, outcome.arrived)
            case _:
                log.error("swap_failed model=%s error=%s", model, outcome.error)
                self._swap_errors[model] = outcome.error or "unknown"
                return events.SwapFailed(model, outcome.pages)

    def _compute_seconds(self) -> float:
        gate = self._worker.gate if self._worker is not None else None
        return self._busy.seconds(time.monotonic(), gate)

    def _fail(self, reason: str) -> None:
        """Nothing more can be served: answer everyone, and let health checks tell."""
        self.failure = reason
        self.state = NodeState.FAILED
        log.critical("node_failed reason=%s", reason)
        self._end_all(Unavailable(f"the device has failed: {reason}"))

    # What others may see

    def snapshot(self) -> NodeSnapshot:
        """Figures for /metrics, /v1/models and /health, taken now."""
        return take_snapshot(self.state, self.failure, len(self._handles), self._worker, self._scheduler)

    def check(self) -> None:
        """Raises AssertionError if memory and the scheduler disagree about what is where, or either is inconsistent.

        For tests, at a moment when no transfer is under way.
        """
        worker, scheduler = self._worker, self._scheduler
        assert worker is not None
        assert scheduler is not None
        worker.swapper.check()
        scheduler.check()
        assert worker.swapper.free_frames == scheduler.free_frames
        for model, served in worker.models.items():
            resident = len(worker.swapper.resident_pages(model))
            assert resident == round(scheduler.resident_fraction(model) * len(served.image.pages)) or not resident
            assert worker.swapper.cache_frames(model) == scheduler.cache_frames(model)

    def _spec(self, served: ServedModel) -> events.ModelSpec:
        config = served.plan.config
        limit = config.max_queue
        return events.ModelSpec(
            model=config.id,
            pages=served.image.pages,
            segments=served.image.segments,
            max_batch_size=config.max_batch_size,
            max_queue=self.config.scheduler.max_queue if limit is None else limit,
            pinned=config.pinned,
            continuous=config.task == "generate",
            blocks_per_frame=served.executor.blocks_per_frame,
        )
