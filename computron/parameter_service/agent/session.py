"""A worker's part in a job: an event loop in a thread of its own, which carries out what `Progress` orders."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import uvloop
from torch import Tensor

from computron.errors import JobRefused, ParameterServiceError
from computron.parameter_service.agent.actions import Action, Wish
from computron.parameter_service.agent.change import Change
from computron.parameter_service.agent.exchange import Exchange
from computron.parameter_service.agent.master_link import MasterLink
from computron.parameter_service.agent.parameters import FlatParameters
from computron.parameter_service.agent.progress import Progress
from computron.parameter_service.agent.questions import Answer
from computron.parameter_service.agent.settings import ParameterService
from computron.parameter_service.agent.staging import Staging
from computron.parameter_service.agent.waiting import waits_for
from computron.parameter_service.layout import Layout
from computron.parameter_service.wire.machine import machine_id
from computron.parameter_service.wire.messages import (
    Address,
    Denied,
    Enlist,
    Extra,
    JobSpec,
    Leave,
    Load,
    Loaded,
    Placement,
    Read,
    ToMaster,
    Unpublished,
    Unreachable,
    Write,
)
from computron.parameter_service.wire.messages import Progress as Report

log = logging.getLogger(__name__)

PATIENCE, REMINDER = 10.0, 60.0  # seconds after which a wait is logged, and logged again
REPORT = 1.0  # seconds between two reports to the master
WAKE = 1.0  # seconds: a wait looks around so often
LEAVING = 2.0  # seconds that a farewell may take
GIVING = 30.0  # seconds that tensors of a version may take before it


class Session:
    """What is called from the training thread says so; everything else runs in the loop's thread."""

    def __init__(self, service: ParameterService, spec: JobSpec, layout: Layout, parameters: FlatParameters) -> None:
        """Starts to enlist at once; wait for `ready` before the parameters are used."""
        self.spec, self.layout, self.parameters = spec, layout, parameters
        self._eager = spec.optimizer == "sum"
        self.progress = Progress(spec.job, service.token, service.incarnation, len(layout.blocks), eager=self._eager)
        self.changed = Change()
        self._took: deque[tuple[float, float]] = deque()  # compute and wait of the iterations not reported yet
        self.working, self.generation = 1, 0  # the step that gradients are for, as the training thread knows it
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._wish: tuple[int, Wish] | None = None  # with the generation it belongs to
        self._load = 0  # the number of the load that is wanted
        self.staging = Staging(
            layout,
            spec.gradients,
            staged=self._staged,
            may_write=self._may_write,
            idle=self._idle,
            failed=self._fail_from_thread,
        )
        machine = machine_id() if service.shared_memory else f"{machine_id()} by TCP"
        self._service, self._machine = service, machine
        self._master = MasterLink(service.master, service.api_key, self._enlist, self._from_master)
        self._exchange = Exchange(
            self.progress, layout, parameters, self.staging, machine, self.changed, self._unreachable, self._fail
        )
        self._calls: deque[Callable[[], list[Action]]] = deque()
        self._calling = False
        self._loop = uvloop.new_event_loop()
        self._loop.set_exception_handler(self._unhandled)
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="computron-agent", daemon=True)
        self._thread.start()

    # Called from the training thread.

    @property
    def skipped(self) -> bool:
        """The last step changed nothing."""
        return self._exchange.skipped

    def check(self) -> None:
        """Raises what has gone wrong in the background, and RuntimeError in a process forked from the right one."""
        if os.getpid() != self._process:
            raise RuntimeError("an optimizer of the Parameter Service works only in the process that made it")
        if self._error is not None:
            if isinstance(self._error, ParameterServiceError):
                raise type(self._error)(self._error.message) from None  # all that is known is in the words
            raise ParameterServiceError(f"the agent of job {self.spec.job} failed: {self._error!r}") from self._error

    def wait(self, done: Callable[[], bool]) -> None:
        """Until it is true; it is asked with `changed` held. Says in the log what a long wait waits for."""
        began = time.monotonic()
        remind = PATIENCE
        with self.changed:
            while not self.changed.wait(lambda: self._error is not None or done(), WAKE):
                if time.monotonic() - began >= remind:
                    log.warning(
                        "job %s has waited %.0f s for %s", self.spec.job, remind, waits_for(self.progress, self._load)
                    )
                    remind += REMINDER
        self.check()

    def call(self, wish: Callable[[], list[Action]]) -> None:
        """Ask the progress for something, in its own thread."""
        self._calls.append(wish)
        if not self._calling:  # it is woken once for all that comes until it runs
            self._calling = True
            self._loop.call_soon_threadsafe(self._do_calls)

    def took(self, compute: float, wait: float) -> None:
        """An iteration is over: seconds."""
        self._took.append((compute, wait))

    def begin(self, step: int, generation: int) -> None:
        """Gradients that come from now on are for this step."""
        self.working, self.generation = step, generation
        self.staging.begin()

    def wish(self, wish: Wish) -> None:
        """The step is to be taken, block by block as their gradients come."""
        self._wish = (self.generation, wish)

    def finish(self, wish: Wish, last: Iterable[tuple[int, Tensor | None]]) -> None:
        """These are the step's last gradients: it is to be taken."""
        generation = self.generation
        self.wish(wish)
        done, untold = self.staging.finish(last)
        if untold:
            self._staged(untold, False)
        self.call(lambda: self._commit(generation, done))

    def stage(self, gradients: Iterable[tuple[int, Tensor | None]]) -> None:
        """All that has come of the step and these, though others may follow. Returns when it is told."""
        self.staging.finish(gradients, final=False)
        self.wait(lambda: self.staging.idle)
        if untold := self.staging.untold():
            self._staged(untold, False)

    def ask(self, message: Read | Write, memory: memoryview, then: Answer) -> None:
        """Read a block's part into `memory`, or write it from there; `then` is called in the loop's thread."""
        self.call(lambda: self._exchange.ask(message, memory, then))

    def want_load(self, number: int) -> None:
        """Tell the master, and again until it is done: this load is wanted; 0 for none any more."""
        self._load = number
        self.say_load()

    def say_load(self) -> None:
        self._loop.call_soon_threadsafe(self._say_load)

    def give(self, extras: Sequence[tuple[Extra, memoryview]]) -> None:
        """These belong to the version that the parameters become after this step."""
        generation = self.generation

        def give() -> list[Action]:
            if generation == self.progress.generation:
                for message, memory in extras:
                    self._exchange.ask(message, memory, lambda _: None)
            return []

        self.call(give)

    def close(self, reason: str) -> None:
        """Leave the job and end the threads, when what belongs to versions has been taken."""
        if os.getpid() != self._process or not self._thread.is_alive():
            return
        told = threading.Event()
        self._loop.call_soon_threadsafe(told.set)
        told.wait(LEAVING)  # what was asked for before is being done
        with self.changed:
            if not self.changed.wait(lambda: not self._exchange.extras_left or self._error is not None, GIVING):
                log.warning("job %s was left before all of its last version was taken", self.spec.job)
            self._error = self._error or ParameterServiceError(f"job {self.spec.job} was left: {reason}")
            self.changed.tell()
        self.staging.close()
        self._loop.call_soon_threadsafe(lambda: self._start(self._leave(reason)))
        self._thread.join()

    # The thread that copies: the push thread, or the training thread that helps it.

    def _staged(self, blocks: list[int], final: bool) -> None:
        generation, step = self.generation, self.working
        self.call(lambda: self._on_staged(generation, step, blocks, final))

    def _may_write(self, block: int) -> bool:
        """The block's staging is free when its owner has applied what lay there."""
        progress, state = self.progress, self.progress.blocks[block]

        def settled() -> bool:
            if self._error is not None or progress.generation != self.generation:
                return True
            return state.applied >= self.working - 1

        if not settled():
            with self.changed:
                while not self.changed.wait(settled, WAKE):
                    continue
        return progress.generation == self.generation

    def _idle(self) -> None:
        with self.changed:
            self.changed.tell()

    def _fail_from_thread(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._fail, error)

    # The loop's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        main = self._start(self._master_forever())
        self._start(self._report())
        try:
            self._loop.run_forever()
        finally:
            main.cancel()
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self._exchange.close()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _master_forever(self) -> None:
        await self._master.run()

    async def _report(self) -> None:
        compute = wait = 0.0
        while True:
            await asyncio.sleep(REPORT)
            progress = self.progress
            self._say_load()
            taken = [self._took.popleft() for _ in range(len(self._took))]
            if taken:
                compute, wait = (math.fsum(seconds) / len(taken) for seconds in zip(*taken, strict=True))
            if progress.epoch:
                await self._master.send(
                    Report(self.spec.job, progress.rank, progress.epoch, progress.step, compute, wait)
                )

    async def _leave(self, reason: str) -> None:
        try:
            async with asyncio.timeout(LEAVING):
                await self._master.send(Leave(self.spec.job, self.progress.rank, self.progress.step, reason))
        except TimeoutError:
            log.warning("the master did not take the farewell of job %s", self.spec.job)
        self._loop.stop()

    def _do_calls(self) -> None:
        self._calling = False
        self._exchange.handle(*(self._calls.popleft() for _ in range(len(self._calls))))

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            if self._error is None:
                log.error("job %s: %r", self.spec.job, error)
                self._error = error
            self.changed.tell()

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._fail(context.get("exception") or ParameterServiceError(context["message"]))

    def _on_staged(self, generation: int, step: int, blocks: list[int], final: bool) -> list[Action]:
        if generation != self.progress.generation:
            return []
        actions = self.progress.staged(step, blocks)
        return actions + self._commit(generation, blocks) if final or self._eager else actions

    def _commit(self, generation: int, blocks: Sequence[int]) -> list[Action]:
        wish = self._wish
        if wish is None or generation != self.progress.generation or wish[0] != generation:
            return []
        return self.progress.commit(wish[1], blocks)

    def _say_load(self) -> None:
        progress, number = self.progress, self._load
        if number:
            ready = progress.loads.begun >= number and progress.ready
            self._tell_master(Load(self.spec.job, progress.rank, progress.epoch, number, progress.step, ready))

    def _unreachable(self, address: Address, reason: str) -> None:
        progress = self.progress
        self._tell_master(Unreachable(self.spec.job, progress.rank, progress.epoch, address, reason))

    def _tell_master(self, message: ToMaster) -> None:
        self._start(self._master.send(message))

    def _enlist(self) -> Enlist:
        service, progress = self._service, self.progress
        return Enlist(
            self.spec, service.token, service.rank, service.incarnation, self._machine, progress.epoch, progress.step
        )

    def _from_master(self, message: Placement | Loaded | Unpublished | Denied) -> None:
        if isinstance(message, Denied):
            self._fail(JobRefused(f"job {message.job}: {message.message} ({message.code})"))
            return
        if isinstance(message, Unpublished):
            log.error("job %s: version %s was not published: %s", message.job, message.version, message.message)
            return
        if isinstance(message, Loaded):
            with self.changed:
                self.progress.loads.loaded(message.number)
                self.changed.tell()
            return
        log.info("job %s: epoch %d, step %d: %s", message.job, message.epoch, message.applied, message.reason)
        self._exchange.placed(message)
