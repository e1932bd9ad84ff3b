"""Groups of communicators: on threads of this process, and on processes that may be killed and stopped."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

from computron.group.communicator import GroupCommunicator
from computron.group.rendezvous import make_store
from computron.models.shard import Shard

HOST = "127.0.0.1"
PATIENCE = 30  # seconds after which a test that still waits has failed


class Threads:
    """The communicators of a whole group, each with a compute thread."""

    def __init__(self, tensor_parallel: int, pipeline_parallel: int) -> None:
        world = tensor_parallel * pipeline_parallel
        shards = [Shard.of_rank(rank, tensor_parallel, pipeline_parallel) for rank in range(world)]
        self.communicators = [GroupCommunicator(shard) for shard in shards]
        self._threads = [ThreadPoolExecutor(1) for _ in shards]
        self._epochs = itertools.count(1)

    def start(self, rank: int, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._threads[rank].submit(call, *arguments)

    def each(self, call: Callable[[GroupCommunicator, int], Any]) -> list[Any]:
        """What the call gives on each node, all at once."""
        running = [self.start(rank, call, c, rank) for rank, c in enumerate(self.communicators)]
        return [future.result(PATIENCE) for future in running]

    def form(self, timeout: float = PATIENCE) -> None:
        epoch = next(self._epochs)
        store, port = make_store(HOST)
        self.each(lambda c, _: c.form(epoch, HOST, port, timeout))
        del store

    def close(self) -> None:
        for communicator, thread in zip(self.communicators, self._threads, strict=True):
            communicator.close()
            thread.shutdown()


@pytest.fixture
def threads() -> Iterator[Callable[[int, int], Threads]]:
    with ExitStack() as stack:

        def form(tensor_parallel: int, pipeline_parallel: int) -> Threads:
            group = Threads(tensor_parallel, pipeline_parallel)
            stack.callback(group.close)
            group.form()
            return group

        yield form


class Process:
    """A process with a GroupCommunicator `c`: see processes.py."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid = pid
        self._connection = connection

    def start(self, code: str) -> None:
        """Evaluate it on the compute thread."""
        self._connection.send(("compute", code))

    def result(self) -> Any:
        """Of what was started first. GroupBroken arrives as its message behind "GroupBroken: "."""
        if not self._connection.poll(PATIENCE):
            pytest.fail(f"process {self.pid} still waits")
        return self._connection.recv()

    def run(self, code: str) -> Any:
        self.start(code)
        return self.result()

    def now(self, code: str) -> None:
        """Evaluate it on another thread, whatever the compute thread waits for."""
        self._connection.send(("now", code))

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


class Processes:
    """Starts processes, by forks of one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self._listener = Listener(str(folder / "socket"), "AF_UNIX")
        script = Path(__file__).with_name("processes.py")
        self._server = subprocess.Popen([sys.executable, str(script), str(folder / "socket")], stdin=subprocess.PIPE)
        self._children: list[Process] = []

    def start(self, rank: int, tensor_parallel: int, pipeline_parallel: int = 1) -> Process:
        assert self._server.stdin is not None
        self._server.stdin.write(bytes([rank, tensor_parallel, pipeline_parallel]))
        self._server.stdin.flush()
        connection = self._listener.accept()
        child = Process(connection.recv(), connection)
        self._children.append(child)
        return child

    def group(self, tensor_parallel: int, pipeline_parallel: int = 1) -> list[Process]:
        world = tensor_parallel * pipeline_parallel
        return [self.start(rank, tensor_parallel, pipeline_parallel) for rank in range(world)]

    def kill_all(self) -> None:
        for child in self._children:
            with suppress(ProcessLookupError):
                child.kill()
        self._children.clear()

    def close(self) -> None:
        self._server.communicate(timeout=PATIENCE)
        self._listener.close()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    starter = Processes(tmp_path_factory.mktemp("processes"))
    yield starter
    starter.close()


@pytest.fixture
def processes(starter: Processes) -> Iterator[Processes]:
    yield starter
    starter.kill_all()
