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
from dataclasses import replace

from computron.config import Config
from computron.errors import ConfigError, ModelNotFound, Unavailable
from computron.execution.requests import Job
from computron.group.environment import Place
from computron.memory.swap import SwapOutcome
from computron.metrics import Metrics
from computron.node.consistency import check
from computron.node.crew import Crew
from computron.node.handle import RequestHandle
from computron.node.progress import Progress
from computron.node.rejections import RETRY_AFTER, rejection, unavailable
from computron.node.requests import Requests
from computron.node.served_model import ServedModel, model_spec
from computron.node.snapshot import NodeSnapshot, NodeState, model_snapshots
from computron.node.steps import Steps
from computron.node.swap_ins import SwapIns
from computron.node.worker import open_worker
from computron.scheduling import actions, events
from computron.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)


class Node:
    """The process that takes requests and leads its group, of which it may be the only node.

    `place`: as whoever launched this process says; None: nobody did. All methods belong to the event loop's thread.
    """

    def __init__(self, config: Config, metrics: Metrics | None = None, place: Place | None = None) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.state = NodeState.STARTING
        self.failure: str | None = None
        self.ended = asyncio.Event()  # set when it can do nothing more and was launched by one who restarts it
        self._place = place
        self._crew: Crew | None = None
        self._scheduler: Scheduler | None = None  # None while nothing can be run
        self._requests = Requests(self.metrics, self._forget)
        self._next_number = 0
        self._events: deque[events.Event] = deque()
        self._handling = False
        self._steps = Steps(self._requests, self._handle, self.failed)
        self._wake: asyncio.TimerHandle | None = None
        self._swap_ins = SwapIns(self.metrics)
        self._swap_errors: dict[str, str] = {}  # the last one of each model
        self._recovery: asyncio.Task[None] | None = None
        self._recoveries = 0
        self._context = contextvars.copy_context()  # of no request: log lines of steps name none

    # Lifecycle

    async def startup(self, progress: Progress | None = None) -> None:
        """Load every model into the host store, meet the group's other nodes, and start to take requests.

        Raises ConfigError or CheckpointError, naming the model, if one of them cannot be served.
        """
        if self.config.group.nodes > 1 and self._place is None:
            raise ConfigError(
                f"the configuration asks for {self.config.group.nodes} nodes: start them together with "
                "`computron launch`",
                param="group",
            )
        place = self._place if self.config.group.nodes > 1 else None
        crew = self._crew = Crew(self.config, await open_worker(self.config, place), place, self)
        await crew.start(progress)
        if self.state is NodeState.STARTING:
            self._resume()

    async def leave(self) -> None:
        """Tell the group's other nodes to stop: this process ends at once."""
        if self._crew is not None:
            await self._crew.leave()

    async def shutdown(self, drain: float) -> None:
        """Take no more requests, give those that are here `drain` seconds to end, then end the rest with an error."""
        if self.state in (NodeState.READY, NodeState.RECOVERING):
            self.state = NodeState.DRAINING
            try:
                async with asyncio.timeout(drain):
                    await self._requests.idle.wait()
            except TimeoutError:
                log.warning("drain_timeout requests=%d", len(self._requests))
        self._requests.end_all(Unavailable("the server is shutting down", retry_after=RETRY_AFTER))
        await self._close()

    async def _close(self) -> None:
        crew, self._crew = self._crew, None
        if crew is None:
            return
        self._stop_scheduling()
        if self._recovery is not None:
            self._recovery.cancel()
        crew.cancel_transfers()
        await self._steps.wait()
        await crew.close()

    def _stop_scheduling(self) -> None:
        self._scheduler = None
        self._swap_ins.forget()
        self._events.clear()
        if self._wake is not None:
            self._wake.cancel()

    # Requests

    @property
    def ready(self) -> bool:
        return self.state is NodeState.READY

    @property
    def models(self) -> Mapping[str, ServedModel]:
        return self._crew.models if self._crew is not None else {}

    def model(self, model: str) -> ServedModel:
        """The model of that id. Raises ModelNotFound, or Unavailable while the node starts or has failed."""
        if self._crew is None or self.state in (NodeState.STARTING, NodeState.FAILED):
            raise self._unavailable()
        served = self._crew.models.get(model)
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
            raise self._unavailable()
        blocks = served.executor.prepare(job)
        now = time.monotonic()
        number = self._next_number
        self._next_number += 1
        served.executor.add(number, job)
        handle = RequestHandle(number, request_id, model, now, self._cancel)
        request = events.Request(
            id=number,
            model=model,
            arrival=now,
            priority=priority + served.plan.config.priority,
            deadline=None if deadline is None else now + deadline,
            cache_blocks=blocks,
        )
        self._requests.open(handle, request)
        self._handle(events.RequestArrived(request))
        return handle

    def load(self, model: str) -> None:
        """Bring the model to the device when nothing more urgent needs the room."""
        self._ask(events.LoadAsked(model))

    def unload(self, model: str) -> None:
        """Take the model off the device once it is idle."""
        self._ask(events.UnloadAsked(model))

    def _ask(self, event: events.LoadAsked | events.UnloadAsked) -> None:
        self.model(event.model)
        if self._scheduler is None:
            raise self._unavailable()
        self._handle(event)

    def _cancel(self, handle: RequestHandle) -> None:
        self._requests.end(handle, outcome="cancelled")
        self._handle(events.RequestCancelled(handle.number))

    def _forget(self, handle: RequestHandle) -> None:
        if not self._steps.drop_after(handle) and self._crew is not None:
            self._crew.models[handle.model].executor.drop(handle.number)

    def _unavailable(self) -> Unavailable:
        return unavailable(self.state, self._why_not_ready(), self.failure, self.config.group.node_timeout)

    def _why_not_ready(self) -> str:
        peers = None if self._crew is None else self._crew.peers
        return "its models are being loaded" if peers is None else peers.why_incomplete()

    # The group

    def broken(self, reason: str) -> None:
        """What was under way comes to nothing; requests wait until the group has formed anew."""
        self._stop_scheduling()
        if self.state is NodeState.READY:
            self.state = NodeState.RECOVERING
        if self.state in (NodeState.RECOVERING, NodeState.DRAINING):
            self._recovery = asyncio.get_running_loop().create_task(self._recover(), context=self._context)

    async def _recover(self) -> None:
        crew = self._crew
        assert crew is not None
        patience = self.config.group.recovery_timeout
        late = asyncio.get_running_loop().call_later(patience, self._give_up_requests, context=self._context)
        try:
            await self._steps.wait()
            await crew.recover()
            self._recoveries += 1
            self._recovery = None
            self._resume()
        except Exception as error:
            self.failed(f"the group cannot be formed anew: {error}")
            raise
        finally:
            late.cancel()

    def _give_up_requests(self) -> None:
        """Nobody shall wait for longer for a node that does not come back."""
        log.error("recovery_timeout requests=%d state=%s", len(self._requests), self._why_not_ready())
        self._requests.end_all(self._unavailable())

    def _resume(self) -> None:
        """Schedule on empty devices. Requests that are here go on with the tokens that they have."""
        crew = self._crew
        assert crew is not None
        agreement = crew.agreement
        self._scheduler = Scheduler(
            frames=agreement.frames,
            frame_bytes=agreement.page_bytes,
            policy=self.config.scheduler.policy,
            max_wait=self.config.scheduler.max_wait,
            prefetch=self.config.scheduler.prefetch,
            link_bandwidth_hint=agreement.link_bandwidth,
            max_steps_in_flight=self.config.group.pipeline_parallel,
        )
        arrivals = []
        for handle, request in self._requests.waiting():
            blocks = crew.models[handle.model].executor.preempt(handle.number)
            deadline = None if handle.timings.queue_seconds is not None else request.deadline
            request = replace(request, cache_blocks=blocks, deadline=deadline, resumed=True)
            arrivals.append(events.RequestArrived(request))
        for served in crew.models.values():
            served.executor.set_cache(0)
            served.executor.limit_cache(served.held.block_bytes, served.held.cache_blocks)
            self._handle(events.ModelAdded(model_spec(served, self.config.scheduler)))
        for arrival in arrivals:
            self._handle(arrival)
        if self.state is not NodeState.DRAINING and self._scheduler is not None:
            self.state = NodeState.READY

    # The main loop

    def _handle(self, event: events.Event) -> None:
        """Tell the scheduler, and do what it says. Events that actions cause wait until all its actions are done."""
        if self._scheduler is None:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events and self._scheduler is not None:
                for action in self._scheduler.handle(self._events.popleft(), time.monotonic()):
                    self._perform(action)
        except Exception as error:
            self.failed(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._handling = False

    def _perform(self, action: actions.Action) -> None:
        crew = self._crew
        if crew is None or self._scheduler is None:
            return
        match action:
            case actions.Run():
                ended = self._steps.start(crew, action)
                if ended is not None:
                    self._events.append(ended)
            case actions.Reject():
                handle = self._requests.get(action.request)
                if handle is not None:
                    error = rejection(action, self._swap_errors.get(action.model))
                    self._requests.end(handle, outcome="rejected", error=error)
            case actions.WakeAt():
                self._wake_at(action.time)
            case actions.Evict():
                crew.perform(action)
                self.metrics.eviction(action.model, action.reason.value, len(action.pages))
                level = logging.DEBUG if self._scheduler.resident_fraction(action.model) else logging.INFO
                pages, reason = len(action.pages), action.reason.value
                log.log(level, "evict model=%s pages=%d reason=%s", action.model, pages, reason)
            case actions.Preempt():
                crew.perform(action)
                log.info("preempt model=%s request=%d", action.model, action.request)
            case actions.SwapIn() | actions.RaiseUrgency() | actions.CancelSwap() | actions.SetCache():
                crew.perform(action)

    def _wake_at(self, moment: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        delay = max(0.0, moment - time.monotonic())
        loop = asyncio.get_running_loop()
        self._wake = loop.call_later(delay, self._handle, events.TimePassed(), context=self._context)

    # Transfers

    def swap_ended(self, outcome: SwapOutcome) -> None:
        """A swap of the whole group is over. The scheduler hears of it first: a step may wait for it."""
        model = outcome.image_id
        match outcome.state:
            case "done":
                complete = self._scheduler is not None and self._scheduler.lacking(model) == len(outcome.pages)
                self._requests.charge_swap(outcome)
                self._handle(events.SwapFinished(model, outcome.pages, outcome.seconds))
                self._swap_ins.arrived(outcome, self._hidden_share(outcome), complete=complete)
            case "cancelled":
                self._handle(events.SwapCancelled(model, outcome.pages, outcome.arrived))
            case _:
                log.error("swap_failed model=%s error=%s", model, outcome.error)
                self._swap_errors[model] = outcome.error or "unknown"
                self._handle(events.SwapFailed(model, outcome.pages))

    def _hidden_share(self, outcome: SwapOutcome) -> float:
        running = [] if self._crew is None else self._crew.worker.computing()
        return self._steps.hidden_share(outcome.finished - outcome.seconds, outcome.finished, running)

    def failed(self, reason: str) -> None:
        """Nothing more can be served: answer everyone, stop the loop, and let health checks tell."""
        if self.state is NodeState.FAILED:
            return
        self.failure = reason
        self.state = NodeState.FAILED
        if self._place is not None:
            self.ended.set()  # whoever launched this process starts it again
        log.critical("node_failed reason=%s", reason)
        self._stop_scheduling()
        if self._crew is not None:
            self._crew.cancel_transfers()
        self._requests.end_all(self._unavailable())

    # What others may see

    def snapshot(self) -> NodeSnapshot:
        """Figures for /metrics, /v1/models and /health, taken now."""
        crew, requests = self._crew, len(self._requests)
        reason = self.failure
        if self.state in (NodeState.STARTING, NodeState.RECOVERING):
            reason = self._why_not_ready()
        if crew is None or self.state is NodeState.STARTING:
            return NodeSnapshot(self.state, reason, requests)
        return NodeSnapshot(
            state=self.state,
            reason=reason,
            requests=requests,
            models=model_snapshots(crew.models, self._scheduler),
            nodes=crew.figures(),
            missing_nodes=0 if crew.peers is None else len(crew.peers.missing()),
            recoveries=self._recoveries,
            frames=crew.agreement.frames,
            page_bytes=crew.agreement.page_bytes,
            stages=self.config.group.pipeline_parallel,
        )

    def check(self) -> None:
        """Raises AssertionError if memory and the scheduler disagree about what is where, or either is inconsistent.

        For tests, at a moment when no transfer is under way. Looks at this node alone.
        """
        assert self._crew is not None
        assert self._scheduler is not None
        check(self._crew, self._scheduler)
