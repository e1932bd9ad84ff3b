"""A node that is not its group's leader: it loads its shards, finds the leader, and carries out what that orders."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import NoReturn

from computron.config import Config
from computron.errors import CheckpointError, ComputronError, ConfigError, GroupBroken, SwapFailed, Unavailable
from computron.execution.requests import Job
from computron.execution.steps import StepInput
from computron.group.codec import decode, encode
from computron.group.environment import Place
from computron.group.link import Link
from computron.group.settings import group_settings
from computron.metrics import Metrics
from computron.node import wire
from computron.node.handle import RequestHandle
from computron.node.measured_gate import MeasuredGate
from computron.node.progress import Progress
from computron.node.snapshot import NodeSnapshot, NodeState
from computron.node.worker import Worker, load_all, open_worker

log = logging.getLogger(__name__)

PROGRESS_PAUSE = 0.2  # seconds between two reports of loading
FIGURES_PAUSE = 1.0  # seconds between two reports of figures


class Follower:
    """All methods belong to the event loop's thread. `ended` is set when the leader has stopped the group."""

    def __init__(self, config: Config, place: Place, metrics: Metrics | None = None) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.state = NodeState.STARTING
        self.failure: str | None = None
        self.refusal: ConfigError | None = None  # why the leader does not take this node in
        self.ended = asyncio.Event()
        self._place = place
        self._worker: Worker | None = None
        self._link = Link(place, group_settings(config))
        self._tasks: set[asyncio.Task[None]] = set()
        self._loaded: wire.Loaded | None = None
        self._progress: dict[str, tuple[int, int]] = {}
        self._told = 0.0
        self._leaving = False  # this process was told to stop; it waits for its leader to stop first

    # Lifecycle

    async def startup(self, progress: Progress | None = None) -> None:
        """Load this node's shards and follow the leader, which reports the progress, from then on.

        Raises ConfigError or CheckpointError.
        """
        loop = asyncio.get_running_loop()

        def report(model: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._loading, model, done, total)

        self._spawn(self._follow())
        try:
            worker = self._worker = await open_worker(self.config, self._place)
            ended = asyncio.ensure_future(self.ended.wait())
            loading = asyncio.ensure_future(load_all(worker, self.config, report))
            await asyncio.wait((loading, ended), return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            if not loading.done():
                await self._stop_loading(worker, loading)
                return
            await loading
        except (ConfigError, CheckpointError) as error:
            self.ended.set()
            await self._link.say_last(encode(wire.LoadFailed(error.message)))  # its operator looks there, not here
            raise
        loop.add_reader(worker.completions_fd, self._on_transfers)
        self._loaded = worker.loaded()
        self._send(self._loaded)
        self._spawn(self._tell_figures())

    async def _stop_loading(self, worker: Worker, loading: asyncio.Future[None]) -> None:
        """The leader has stopped the group, or does not want this node. Raises ConfigError with its reason."""
        await worker.stop_loading()
        await asyncio.wait([loading])
        loading.exception()
        if self.refusal is not None:
            raise self.refusal

    async def leave(self) -> None:
        """This process ends at once. The leader hears of it by the connection's end."""

    async def shutdown(self, drain: float) -> None:
        """Follow the leader until it stops, which may let its requests end, but no longer than `drain` seconds."""
        if drain and self._link.connected and not self.ended.is_set():
            self._leaving = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain):
                    await self.ended.wait()
        self._link.close()
        worker, self._worker = self._worker, None
        for task in list(self._tasks):
            task.cancel()
        if worker is None:
            return
        asyncio.get_running_loop().remove_reader(worker.completions_fd)
        worker.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, worker.close)

    # The leader

    async def _follow(self) -> None:
        while not self.ended.is_set():
            try:
                await self._link.connect()
            except ConfigError as error:
                self._refused(error)
                return
            for model, (done, total) in self._progress.items():
                self._send(wire.Loading(model, done, total))
            if self._loaded is not None:
                self._send(self._loaded)
            async for body in self._link.messages():
                self._obey(decode(body, wire.Order))
                if self.ended.is_set():
                    return
            if self._leaving:
                self.ended.set()
                return
            log.warning("leader_lost reason=%s", self._link.why_lost)
            await self._rest()

    def _obey(self, order: wire.Order) -> None:
        if isinstance(order, wire.Stop):
            log.info("stopped_by_leader")
            self.ended.set()
            return
        if isinstance(order, wire.Refuse):
            self._refused(ConfigError(order.reason))
            return
        worker = self._worker
        match order:
            case wire.Reset(epoch):
                self._spawn(self._reset(epoch))
                return
        assert worker is not None, "nothing is ordered of a node that has not loaded"
        match order:
            case wire.Form():
                self._spawn(self._form(worker, order))
            case wire.BringPages(model, pages, urgency):
                worker.swap_in(model, pages, urgency)
            case wire.HastenPages(model, urgency):
                worker.hasten(model, urgency)
            case wire.StopPages(model):
                worker.cancel(model)
            case wire.DropPages(model, pages):
                worker.evict(model, pages)
            case wire.ResizeCache(model, frames, moves):
                worker.set_cache(model, frames, moves)
            case wire.RunStep(number, model, step):
                self._start_step(worker, number, model, step)

    async def _rest(self) -> None:
        """Take everything off the device: whoever leads next starts from nothing."""
        if self.state is NodeState.READY:
            self.state = NodeState.RECOVERING
        if self._worker is not None and self._loaded is not None:
            await self._worker.reset()

    async def _reset(self, epoch: int) -> None:
        await self._rest()
        self._send(wire.Idle(epoch))

    async def _form(self, worker: Worker, order: wire.Form) -> None:
        try:
            worker.identify(order.identities)
            await worker.form(order.epoch, order.host, order.port, self.config.group.node_timeout)
        except GroupBroken as error:
            self._send(wire.FormFailed(order.epoch, error.message))
            return
        self.state = NodeState.READY
        log.info("group_formed epoch=%d", order.epoch)
        self._send(wire.Formed(order.epoch))

    # Steps

    def _start_step(self, worker: Worker, number: int, model: str, step: StepInput) -> None:
        try:
            gate = worker.begin_step(model)
        except SwapFailed as error:
            self._spawn(self._skip(worker, number, error))
            return
        self._spawn(self._run(worker, number, model, step, gate))

    async def _skip(self, worker: Worker, number: int, error: SwapFailed) -> None:
        """A step cannot begin here. Those ahead of it end first."""
        await worker.leave_stages(error)
        self._send(wire.StepFailed(number, "swap", error.message))

    async def _run(self, worker: Worker, number: int, model: str, step: StepInput, gate: MeasuredGate) -> None:
        report: wire.Report
        try:
            output = await worker.run(model, step, gate)
            report = wire.StepDone(number, gate.waited_seconds(), output)
        except SwapFailed as error:
            report = wire.StepFailed(number, "swap", error.message)
        except GroupBroken as error:
            report = wire.StepFailed(number, "group", error.message)
        except ComputronError as error:
            log.exception("step_failed model=%s", model)
            report = wire.StepFailed(number, "model", error.message)
        worker.end_step(model, gate)
        try:
            self._send(report)
        except (TypeError, ValueError) as error:  # a custom model's, which is no plain data or too much of it
            report = wire.StepFailed(number, "model", f"its output cannot be sent: {error}")
            self._send(report)
        reason = worker.device_error() if isinstance(report, wire.StepFailed) else None
        if reason is not None:
            self._fail(reason)

    def _on_transfers(self) -> None:
        worker = self._worker
        if worker is None:
            return
        for outcome in worker.completions():
            self._send(wire.PagesCame(outcome))
        if worker.backend.failed is not None:
            self._fail(worker.backend.failed)

    # Telling the leader

    def _send(self, report: wire.Report) -> None:
        self._link.send(encode(report))

    def _loading(self, model: str, done: int, total: int) -> None:
        self._progress[model] = (done, total)
        now = time.monotonic()
        if done == total or now - self._told > PROGRESS_PAUSE:
            self._told = now
            self._send(wire.Loading(model, done, total))

    async def _tell_figures(self) -> None:
        while (worker := self._worker) is not None:
            self._send(worker.figures())
            await asyncio.sleep(FIGURES_PAUSE)

    def _refused(self, error: ConfigError) -> None:
        self.refusal = error
        self._fail(error.message)

    def _fail(self, reason: str) -> None:
        """This process can do nothing more; whoever started it starts it again."""
        if self.state is NodeState.FAILED:
            return
        self.failure = reason
        self.state = NodeState.FAILED
        log.critical("node_failed reason=%s", reason)
        self._send(wire.NodeFailed(reason))
        self.ended.set()

    def _spawn(self, job: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("node_failed", exc_info=error)
            self._fail(f"{type(error).__name__}: {error}")

    # What others may see

    @property
    def ready(self) -> bool:
        return self.state is NodeState.READY

    def model(self, model: str) -> NoReturn:
        raise Unavailable("this node takes no requests: send them to its group's leader")

    def submit(
        self, model: str, job: Job, *, request_id: str, priority: int = 0, deadline: float | None = None
    ) -> RequestHandle:
        self.model(model)

    def load(self, model: str) -> None:
        self.model(model)

    def unload(self, model: str) -> None:
        self.model(model)

    def snapshot(self) -> NodeSnapshot:
        """Figures of this node alone, for its own /health and /metrics."""
        nodes = {} if self._worker is None else {self._place.rank: self._worker.figures()}
        return NodeSnapshot(self.state, self.failure, 0, (), nodes)
