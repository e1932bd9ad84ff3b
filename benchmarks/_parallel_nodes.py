"""Groups of real node processes on this machine, forked from one that has imported the libraries already."""

from __future__ import annotations

import functools
import http.client
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from _processes import HOST, free_port

from computron.config import Config

LIBRARIES = ["torch", "transformers.models.opt.modeling_opt", "computron.api.process"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
START_SECONDS = 300
END_SECONDS = 30
FIGURES_SECONDS = 10  # nodes tell their figures once a second


class Silent:
    def loading(self, model: str, done: int, total: int) -> None: ...

    def ready(self, url: str) -> None: ...

    def close(self) -> None: ...


def serve_node(config: Config, environment: Mapping[str, str], log: str, early_start: bool) -> None:
    """What `computron serve` runs as a node. Without `early_start` a run waits until all pages of its model are there,
    which is no option of the product: it is measured with it and taken apart without it.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)

    import torch

    from computron.api import process
    from computron.node import node
    from computron.scheduling.scheduler import Scheduler
    from computron.scheduling.tuning import Tuning

    torch.set_num_threads(1)
    if not early_start:
        setattr(node, "Scheduler", functools.partial(Scheduler, tuning=Tuning(early_start=0.0)))  # noqa: B010
    sys.exit(process.run(config, Silent))


@dataclass(frozen=True)
class Answer:
    """One request's way, in seconds. `response`: the client's. The server's own, from the request's arrival: `queue`
    until its step began, `first_output` until that had ended. `load`: of the swap it waited for, on the slowest node.
    `nbytes`: moved by that swap on all nodes together.
    """

    response: float
    queue: float
    first_output: float
    load: float
    nbytes: int

    @property
    def step(self) -> float:
        return self.first_output - self.queue


class Group:
    """A group that takes requests, and one client."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=120)

    def ask(self, model: str, prompt: list[int]) -> Answer:
        """The time of one token. Raises RuntimeError if the server refuses."""
        body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", "X-Computron-Timings": "1"}
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, headers)
        with self._connection.getresponse() as response:
            text = response.read()
        seconds = time.perf_counter() - began
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {text.decode(errors='replace')[:300]}")
        told = json.loads(text)["computron"]
        return Answer(
            seconds, told["queue_seconds"], told["first_output_seconds"], told["swap_seconds"], told["swap_bytes"]
        )

    def moved(self, total: int) -> list[int]:
        """Bytes that each node has moved to its device so far, by rank, once all have told. `total`: of all of them.

        Raises RuntimeError if they do not come to this sum.
        """
        deadline = time.monotonic() + FIGURES_SECONDS
        while sum(moved := self._transfer_bytes()) != total:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nodes have moved {moved} bytes, which is not what the answers told: {total}")
            time.sleep(0.1)
        return moved

    def _transfer_bytes(self) -> list[int]:
        self._connection.request("GET", "/metrics")
        with self._connection.getresponse() as response:
            lines = response.read().decode().splitlines()
        return [int(float(line.split()[-1])) for line in lines if line.startswith("computron_transfer_bytes_total{")]

    def ready(self) -> bool:
        try:
            self._connection.request("GET", "/health/ready")
            with self._connection.getresponse() as response:
                response.read()
            return response.status == 200
        except OSError:
            self._connection.close()
            return False

    def close(self) -> None:
        self._connection.close()


@contextmanager
def running(config: Config, *, early_start: bool) -> Iterator[Group]:
    """Start all nodes, and stop them at the end. Raises RuntimeError, with its last words, if the leader has ended."""
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    nodes = config.group.nodes
    port, master = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        for rank in range(nodes):
            own = replace(config, server=replace(config.server, host=HOST, port=0 if rank else port))
            log = str(Path(folder) / f"node-{rank}.log")
            arguments = (own, _environment(rank, nodes, master), log, early_start)
            processes.append(context.Process(target=serve_node, args=arguments, daemon=True))
            processes[-1].start()
        group = Group(port)
        try:
            _wait_until_ready(group, processes[0], Path(folder) / "node-0.log")
            yield group
        finally:
            group.close()
            _stop(processes)


def _environment(rank: int, nodes: int, master: int) -> dict[str, str]:
    if nodes == 1:
        return {}
    here = {"RANK": rank, "WORLD_SIZE": nodes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": nodes}
    return {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": HOST, "MASTER_PORT": str(master)}


def _wait_until_ready(group: Group, leader: BaseProcess, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not group.ready():
        if leader.exitcode is not None or time.monotonic() > deadline:
            words = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"the group did not start:\n{words}")
        time.sleep(0.1)


def _stop(processes: list[BaseProcess]) -> None:
    """The leader as an operator would; the others follow it."""
    leader = processes[0]
    if leader.is_alive() and leader.pid is not None:
        os.kill(leader.pid, signal.SIGTERM)
    for process in processes:
        process.join(END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
