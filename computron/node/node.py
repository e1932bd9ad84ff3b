"""The node: requests and transfers in, scheduler's actions out.

The main loop is `_handle`: every event goes to the scheduler, every action it gives is performed at once. Nothing here
decides; nothing in the scheduler does.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Mapping

from computron.config import Config
from computron.errors import ConfigError, ModelNotFound, SwapFailed, Unavailable
from computron.execution.requests import Job
from computron.memory.swapper import SwapOutcome
from computron.metrics import Metrics
from computron.models.plan import plan_model
from computron.node.busy import BusyClock
from computron.node.handle import RequestHandle
from computron.node.measured_gate import MeasuredGate
from computron.node.rejections import RETRY_AFTER, rejection
from computron.node.requests import Requests
from computron.node.snapshot import NodeSnapshot, NodeState, take_snapshot
from computron.node.worker import Progress, ServedModel, Worker
from computron.scheduling import actions, events
from computron.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

MAX_ABORTS = (
    5  # steps of a model in a row that came to nothing, before their requests are told; more than swaps are retried
)


class Node:
    """One process that serves its models from one device. All methods belong to the event loop's thread."""

    def __init__(self, config: Config, metrics: Metrics | None = None) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.state = NodeState.STARTING
        self.failure: str | None = None
        self._worker: Worker | None = None
        self._scheduler: Scheduler | None = None
        self._requests = Requests(self.metrics, self._forget)
        self._next_number = 0
        self._events: deque[events.Event] = deque()
        self._handling = False
        self._dropped: dict[str, set[int]] = {}  # ended while their model's step runs; dropped after it
        self._step: asyncio.Task[None] | None = None
        self._stepping: str | None = None
        self._aborts: dict[str, int] = {}  # steps in a row of each model that came to nothing
        self._wake: asyncio.TimerHandle | None = None
        self._busy = BusyClock()
        self._swap_errors: dict[str, str] = {}  # the last one of each model
        self._context = contextvars.copy_context()  # of no request: log lines of steps name none

    # Lifecycle

    async def startup(self, progress: Progress | None = None) -> None:
        """Load every model into the host store and start to take requests.

        Raises ConfigError or CheckpointError, naming the model, if one of them cannot be served.
        """
        loop = asyncio.get_running_loop()
        if self.config.group.nodes > 1:
            raise ConfigError("models are served from one node; only 1 is possible yet", param="group")
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
        worker.check_sizes(plans)
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
                    await self._requests.idle.wait()
            except TimeoutError:
                log.warning("drain_timeout requests=%d", len(self._requests))
        self._requests.end_all(Unavailable("the server is shutting down", retry_after=RETRY_AFTER))
        await self._close()

    async def _close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        self._stop_listening(worker)
        worker.cancel_transfers()
        if self._step is not None:
            await asyncio.wait([self._step])
        await asyncio.get_running_loop().run_in_executor(None, worker.close)

    def _stop_listening(self, worker: Worker) -> None:
        if self._wake is not None:
            self._wake.cancel()
        asyncio.get_running_loop().remove_reader(worker.completions_fd)

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

        Raises ModelNotFound, BadRequest, ContextTooLong or Unavailable; errors that come later, QueueFull among them,
        are raised from the handle's iteration.
        """
        served = self.model(model)
        if not self.ready:
            raise Unavailable(self._why_unavailable(), retry_after=RETRY_AFTER)
        blocks = served.executor.prepare(job)
        now = time.monotonic()
        number = self._next_number
        self._next_number += 1
        served.executor.add(number, job)
        handle = RequestHandle(number, request_id, model, now, self._cancel)
        self._requests.open(handle)
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
        self._requests.end(handle, outcome="cancelled")
        self._handle(events.RequestCancelled(handle.number))

    def _forget(self, handle: RequestHandle) -> None:
        if self._stepping == handle.model:
            self._dropped.setdefault(handle.model, set()).add(handle.number)
        elif self._worker is not None:
            self._worker.models[handle.model].executor.drop(handle.number)

    def _why_unavailable(self) -> str:
        match self.state:
            case NodeState.STARTING:
                return "the server is starting: its models are being loaded"
            case NodeState.FAILED:
                return f"the server has failed and must be restarted: {self.failure}"
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
            while self._events and self.state is not NodeState.FAILED:
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
                self._start_step(worker, action)
            case actions.Reject():
                handle = self._requests.get(action.request)
                if handle is not None:
                    error = rejection(action, self._swap_errors.get(action.model))
                    self._requests.end(handle, outcome="rejected", error=error)
            case actions.WakeAt():
                self._wake_at(action.time)
            case actions.Evict():
                worker.perform(action)
                self.metrics.eviction(action.model, action.reason.value, len(action.pages))
                log.info("evict model=%s pages=%d reason=%s", action.model, len(action.pages), action.reason.value)
            case actions.Preempt():
                worker.perform(action)
                log.info("preempt model=%s request=%d", action.model, action.request)
            case actions.SwapIn() | actions.RaiseUrgency() | actions.CancelSwap() | actions.SetCache():
                worker.perform(action)

    def _wake_at(self, moment: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        delay = max(0.0, moment - time.monotonic())
        loop = asyncio.get_running_loop()
        self._wake = loop.call_later(delay, self._handle, events.TimePassed(), context=self._context)

    # Steps

    def _start_step(self, worker: Worker, action: actions.Run) -> None:
        # The gate is taken now: between now and the task's start, a swap of the model may fail.
        try:
            gate = worker.begin_step(action.model)
        except SwapFailed as error:
            self._events.append(self._aborted(action, error))
            return
        self._stepping = action.model
        self._requests.begin_step(action.requests)
        run = self._run(worker, action, gate)
        self._step = asyncio.get_running_loop().create_task(run, context=self._context)

    async def _run(self, worker: Worker, action: actions.Run, gate: MeasuredGate) -> None:
        model = action.model
        event: events.Event
        try:
            result = await worker.run(action, gate)
        except SwapFailed as error:
            event = self._aborted(action, error)
        except Exception as error:
            log.exception("step_failed model=%s requests=%s", model, self._names(action.requests))
            self._requests.fail(action.requests, error)
            event = events.StepFailed(model, action.requests)
            reason = worker.device_error()
            if reason is not None:
                self._fail(reason)
        else:
            self._aborts.pop(model, None)
            self._requests.deliver(model, result)
            event = events.StepFinished(model, result.finished, gate.computed_seconds(), result.cache_blocks)
        self._busy.add(gate.computing(time.monotonic()))
        worker.end_step(model)
        self._stepping = None
        self._step = None
        for number in self._dropped.pop(model, ()):
            worker.models[model].executor.drop(number)
        self._handle(event)

    def _aborted(self, action: actions.Run, error: SwapFailed) -> events.Event:
        """The step came to nothing. Its requests wait again, unless that has happened too often in a row."""
        aborts = self._aborts[action.model] = self._aborts.get(action.model, 0) + 1
        log.warning("step_aborted model=%s times=%d error=%s", action.model, aborts, error)
        if aborts < MAX_ABORTS:
            return events.StepAborted(action.model)
        del self._aborts[action.model]
        self._requests.fail(action.requests, error)
        return events.StepFailed(action.model, action.requests)

    def _names(self, numbers: tuple[int, ...]) -> str:
        handles = (self._requests.get(number) for number in numbers)
        return ",".join(handle.request_id for handle in handles if handle is not None)

    # Transfers

    def _on_transfers(self) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            for outcome in worker.completions():
                self._handle(self._swap_event(outcome))
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
        reason = worker.backend.failed
        if reason is not None:
            self._fail(reason)

    def _swap_event(self, outcome: SwapOutcome) -> events.Event:
        model = outcome.image_id
        match outcome.state:
            case "done":
                hidden = self._hidden_share(outcome)
                self.metrics.swap_finished(model, outcome.seconds, hidden, outcome.bytes_moved)
                self._requests.charge_swap(outcome)
                log.info(
                    "swap_in model=%s pages=%d bytes=%d seconds=%.4f hidden=%.2f",
                    model, len(outcome.pages), outcome.bytes_moved, outcome.seconds, hidden,
                )  # fmt: skip
                return events.SwapFinished(model, outcome.pages, outcome.seconds)
            case "cancelled":
                return events.SwapCancelled(model, outcome.pages, outcome.arrived)
            case _:
                log.error("swap_failed model=%s error=%s", model, outcome.error)
                self._swap_errors[model] = outcome.error or "unknown"
                return events.SwapFailed(model, outcome.pages)

    def _hidden_share(self, outcome: SwapOutcome) -> float:
        gate = self._worker.gate if self._worker is not None else None
        running = [] if gate is None else gate.computing(time.monotonic())
        return self._busy.hidden_share(outcome.finished - outcome.seconds, outcome.finished, running)

    def _fail(self, reason: str) -> None:
        """Nothing more can be served: answer everyone, stop the loop, and let health checks tell."""
        if self.state is NodeState.FAILED:
            return
        self.failure = reason
        self.state = NodeState.FAILED
        log.critical("node_failed reason=%s", reason)
        if self._worker is not None:
            self._stop_listening(self._worker)
            self._worker.cancel_transfers()
        self._requests.end_all(Unavailable(self._why_unavailable(), retry_after=RETRY_AFTER))

    # What others may see

    def snapshot(self) -> NodeSnapshot:
        """Figures for /metrics, /v1/models and /health, taken now."""
        return take_snapshot(self.state, self.failure, len(self._requests), self._worker, self._scheduler)

    def check(self) -> None:
        """Raises AssertionError if memory and the scheduler disagree about what is where, or either is inconsistent.

        For tests, at a moment when no transfer is under way.
        """
        worker, scheduler = self._worker, self._scheduler
        assert worker is not None
        assert scheduler is not None
        worker.swapper.check()
        worker.store.check()
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
