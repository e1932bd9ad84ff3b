"""Starts the nodes of one host, restarts those that die or hang, and ends them in order.

The main loop is `Supervisor._handle`: what happens to the processes goes to `Supervision`, whose orders are carried out
at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

from computron.group.heartbeat import EVERY
from computron.group.starting import Starter
from computron.group.supervision import (
    Asked,
    Beat,
    Died,
    Event,
    HeartbeatClosed,
    Order,
    Send,
    Start,
    Supervision,
    Tick,
    Told,
)

log = logging.getLogger(__name__)

RESTARTS = "COMPUTRON_RESTARTS"  # how many times a node was started before
BEATS = 4  # that a node gives at least in the time after which its silence means that it hangs
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Supervisor:
    """`environments`: what is particular to each rank's, added to this process's own.

    Reaps every child of this process, as the first process of a container has to.
    """

    def __init__(
        self, starter: Starter, environments: Mapping[int, Mapping[str, str]], timeout: float, drain: float
    ) -> None:
        self._starter = starter
        self._environments = environments
        self._supervision = Supervision(list(environments), timeout, drain)
        self._processes: dict[int, _Process] = {}
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()

    async def run(self) -> int:
        """Until all nodes have ended for good. Returns the exit code."""
        signals = [number for number in STOP_SIGNALS if not _ignored_hangup(number)]
        for number in signals:
            self._loop.add_signal_handler(number, self._handle_signal, number)
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        try:
            self._tick()
            return await self._ended
        finally:
            for number in (*signals, signal.SIGCHLD):
                self._loop.remove_signal_handler(number)
            for process in self._processes.values():  # after an error of this class's own
                process.close()

    def _tick(self) -> None:
        self._handle(Tick())
        if not self._ended.done():
            self._loop.call_later(self._supervision.tick, self._tick)

    def _handle_signal(self, number: signal.Signals) -> None:
        log.info("shutdown signal=%s", number.name)
        self._handle(Asked(number))

    def _handle(self, event: Event) -> None:
        for order in self._supervision.handle(event, time.monotonic()):
            self._perform(order)
        result = self._supervision.result
        if result is not None and not self._ended.done():
            self._ended.set_result(result)

    def _perform(self, order: Order) -> None:
        match order:
            case Start(rank, restarts):
                self._start(rank, restarts)
            case Send(rank, number):
                os.kill(self._processes[rank].pid, number)
            case Told():
                self._tell(order)

    def _start(self, rank: int, restarts: int) -> None:
        beat = self._supervision.timeout / BEATS
        environment = {**self._environments[rank], RESTARTS: str(restarts), EVERY: str(beat)}
        try:
            process = _Process(self._starter, environment, self._loop)
        except OSError as error:
            log.error("node_not_started node=%d reason=%s", rank, error)
            self._processes.pop(rank, None)
            self._loop.call_soon(self._handle, Died(rank, 1))
            return
        self._processes[rank] = process
        process.listen(lambda: self._handle(Beat(rank)), lambda: self._handle(HeartbeatClosed(rank)))
        log.info("node_started node=%d pid=%d restarts=%d", rank, process.pid, restarts)

    def _reap(self) -> None:
        """Take leave of every child that has ended: nodes, and in a container whatever lost its parent."""
        while (pid := _ended_child()) is not None:
            rank = next((rank for rank, process in self._processes.items() if process.pid == pid), None)
            if rank is None:
                os.waitpid(pid, 0)
            else:
                self._handle(Died(rank, self._processes[rank].end()))

    def _tell(self, told: Told) -> None:
        pid = self._processes[told.rank].pid if told.rank in self._processes else 0
        match told.kind:
            case "hung":
                log.error("node_hung node=%d pid=%d timeout=%.1f", told.rank, pid, self._supervision.timeout)
            case "killed":
                log.warning("node_killed node=%d pid=%d", told.rank, pid)
            case _ if told.pause is not None:
                log.error("node_died node=%d pid=%d how=%s restart_in=%.1f", told.rank, pid, how(told.code), told.pause)
            case _:
                log.info("node_ended node=%d pid=%d how=%s", told.rank, pid, how(told.code))


class _Process:
    """A node's process, whose heartbeat is listened to."""

    def __init__(self, starter: Starter, environment: Mapping[str, str], loop: asyncio.AbstractEventLoop) -> None:
        """Raises OSError."""
        self._loop = loop
        beats, writer = os.pipe()
        try:
            self.pid = starter.start(environment, writer)
        except BaseException:
            os.close(beats)
            raise
        finally:
            os.close(writer)
        self._beats: int | None = beats

    def listen(self, beat: Callable[[], None], closed: Callable[[], None]) -> None:
        assert self._beats is not None
        fd = self._beats

        def readable() -> None:
            if os.read(fd, 65536):
                beat()
            else:
                self.close()
                closed()

        self._loop.add_reader(fd, readable)

    def end(self) -> int:
        """Its exit code, or minus the number of the signal that ended it. What it started itself is killed.

        Only after it has ended; its pid, and so its process group's, is taken until then.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Listen no longer. Idempotent."""
        fd, self._beats = self._beats, None
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)


def how(code: int) -> str:
    """How a process ended, in words: "SIGKILL" or "exit code 1"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _ignored_hangup(number: signal.Signals) -> bool:
    """Whether this process was started with nohup, and so is to outlive its terminal."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _ended_child() -> int | None:
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return ended.si_pid if ended is not None else None
