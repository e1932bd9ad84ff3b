from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from computron.group import warm
from computron.group.heartbeat import Heartbeat
from computron.group.supervision import REPEATED
from computron.group.supervisor import how

HERE = Path(__file__).parent
BOTH = pytest.mark.parametrize("modules", ["-", "asyncio,computron.group.heartbeat"], ids=["cold", "warm"])
PATIENCE = 30.0  # seconds for what takes a fraction of one


class Launch:
    """A supervisor in a process of its own, over stand-ins for nodes."""

    def __init__(
        self, folder: Path, behaviour: dict[str, Any], *, ranks: str, timeout: float, nohup: bool, modules: str
    ) -> None:
        self.folder = folder
        node = [sys.executable, str(HERE / "stand_in.py"), str(folder), json.dumps(behaviour)]
        command = [sys.executable, str(HERE / "supervised.py"), modules, ranks, str(timeout), "30", *node]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["nohup", *command] if nohup else command, stderr=log, stdout=subprocess.DEVNULL
            )

    def node(self, rank: int, restarts: int = 0) -> dict[str, Any]:
        """What the node said of itself at this start, waiting for it."""
        path = self.folder / f"{rank}.{restarts}"
        wait_until(path.exists, self)
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts

    def pid(self, rank: int, restarts: int = 0) -> int:
        return int(self.node(rank, restarts)["pid"])

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def stop(self) -> int:
        self.process.terminate()
        return self.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


def wait_until(condition, launch: Launch | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, launch.log if launch is not None else "it did not happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def launch(tmp_path) -> Iterator[Any]:
    launches: list[Launch] = []

    def start(
        *, ranks: str = "0,1", timeout: float = 30.0, nohup: bool = False, modules: str = "-", **behaviour: Any
    ) -> Launch:
        by_rank = {name.removeprefix("node"): what for name, what in behaviour.items()}
        launches.append(Launch(tmp_path, by_rank, ranks=ranks, timeout=timeout, nohup=nohup, modules=modules))
        return launches[-1]

    yield start
    for one in launches:
        one.process.kill()
        one.process.wait()
    pids = [json.loads(path.read_text())["pid"] for path in tmp_path.glob("[0-9].*")]
    wait_until(lambda: all(gone(pid) for pid in pids))


@BOTH
def test_nodes_run_apart_and_are_told_who_they_are(launch, modules):
    running = launch(modules=modules)
    nodes = [running.node(0), running.node(1)]
    for rank, node in enumerate(nodes):
        assert node["environment"]["RANK"] == str(rank)
        assert node["session"] == node["pid"]
        assert node["stdin"] == "/dev/null"
    assert running.stop() == 0
    assert f"computron.group.supervisor: node_started node=1 pid={nodes[1]['pid']} restarts=0" in running.log


@BOTH
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_node_is_started_again_and_the_others_stay(launch, modules, rank):
    running = launch(modules=modules)
    first, other = running.pid(rank), running.pid(1 - rank)
    os.kill(first, signal.SIGKILL)
    assert running.pid(rank, restarts=1) != first
    assert not gone(other)
    assert f"node_died node={rank} pid={first} how=SIGKILL restart_in=0.0" in running.log
    assert running.stop() == 0


@BOTH
def test_what_a_dead_node_had_started_is_killed(launch, modules):
    running = launch(modules=modules, node1={"child": True})
    node = running.node(1)
    os.kill(node["pid"], signal.SIGKILL)
    running.node(1, restarts=1)
    wait_until(lambda: gone(node["child"]))


@pytest.mark.parametrize("kill", [True, False])
def test_nodes_start_cold_once_the_warm_process_is_lost(launch, kill):
    running = launch(modules="asyncio,computron.group.heartbeat" if kill else "computron.no_such_module")
    nodes = {running.pid(0), running.pid(1)}
    if kill:
        children = psutil.Process(running.process.pid).children()
        (spare,) = [child for child in children if child.pid not in nodes]
        spare.kill()
    os.kill(running.pid(1), signal.SIGKILL)
    assert running.pid(1, restarts=1) not in nodes
    assert "warm_start_lost" in running.log
    assert not gone(running.pid(0))
    assert running.stop() == 0


def test_a_process_with_threads_is_not_forked(launch, tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    running = launch(modules="threaded")
    running.node(0)
    assert 'warm_start_lost reason="loading the libraries started 1 threads' in running.log


@pytest.mark.parametrize(("answer", "reason"), [(3, None), (0, "initialised CUDA"), (100, "initialised CUDA")])
def test_a_process_that_has_initialised_cuda_is_not_forked(monkeypatch, answer, reason):
    driver = SimpleNamespace(cuDeviceGetCount=lambda count: answer)
    monkeypatch.setattr(warm.os, "listdir", lambda path: ["1"])
    monkeypatch.setattr(warm.Path, "read_text", lambda path: "7f00-7fff r--p 00000000 08:01 1 /usr/lib/libcuda.so.1\n")
    monkeypatch.setattr(warm.ctypes, "CDLL", lambda name: driver)
    assert (warm.why_not() is None) == (reason is None)
    assert reason is None or reason in (warm.why_not() or "")


def test_dead_nodes_leave_no_zombies(launch):
    running = launch()
    os.kill(running.pid(1), signal.SIGKILL)
    running.node(1, restarts=1)
    children = psutil.Process(running.process.pid).children()
    assert {child.pid for child in children} == {running.pid(0), running.pid(1, restarts=1)}


@BOTH
def test_a_hung_node_is_killed_and_started_again(launch, modules):
    running = launch(modules=modules, timeout=2.0)
    hung = running.pid(1)
    os.kill(hung, signal.SIGSTOP)
    assert running.pid(1, restarts=1) != hung
    assert gone(hung)
    assert f"node_hung node=1 pid={hung} timeout=2.0" in running.log
    assert not gone(running.pid(0))


def test_a_node_beats_often_enough_for_a_short_timeout(launch):
    node = launch(timeout=0.5).node(1)
    assert float(node["environment"]["COMPUTRON_HEARTBEAT_SECONDS"]) < 0.25


def test_a_node_without_heartbeat_is_left_alone(launch):
    running = launch(timeout=0.2, node1={"mute": True}, node0={"closed": True})
    quiet = running.pid(1), running.pid(0)
    time.sleep(1.0)
    assert not any(gone(pid) for pid in quiet)


def test_a_supervisor_that_was_stopped_kills_nobody(launch):
    running = launch(timeout=1.0)
    pids = running.pid(0), running.pid(1)
    supervisor, *nodes = [psutil.Process(pid) for pid in (running.process.pid, *pids)]
    for process in (supervisor, *nodes):
        process.suspend()
    time.sleep(2.0)
    supervisor.resume()
    time.sleep(0.3)  # it has looked at its nodes, which have not had time to beat
    for process in nodes:
        process.resume()
    time.sleep(0.3)
    assert running.stop() == 0
    assert "node_hung" not in running.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_stop_signal_ends_all_nodes_in_order(launch, number):
    running = launch()
    pids = running.pid(0), running.pid(1)
    running.process.send_signal(number)
    assert running.wait() == 0
    assert all(gone(pid) for pid in pids)
    assert f"shutdown signal={number.name}" in running.log


def test_nohup_lets_a_launch_outlive_its_terminal(launch):
    running = launch(nohup=True)
    pid = running.pid(0)
    running.process.send_signal(signal.SIGHUP)
    os.kill(running.pid(1), signal.SIGKILL)
    running.node(1, restarts=1)
    assert not gone(pid)


@BOTH
def test_a_second_signal_kills_nodes_that_do_not_end(launch, modules):
    running = launch(modules=modules, node0={"ignore": ["SIGTERM"]}, node1={"deaf": True})
    pids = running.pid(0), running.pid(1)
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "shutdown" in running.log, running)
    time.sleep(REPEATED)
    running.process.send_signal(signal.SIGINT)
    assert running.wait() == 128 + signal.SIGINT
    assert all(gone(pid) for pid in pids)
    assert f"node_killed node=1 pid={pids[1]}" in running.log


@BOTH
def test_nodes_die_with_a_killed_supervisor(launch, modules):
    running = launch(modules=modules, node1={"ignore": ["SIGTERM", "SIGHUP"]})
    pids = running.pid(0), running.pid(1)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: all(gone(pid) for pid in pids))


@BOTH
def test_the_code_of_a_node_that_can_never_start_is_the_launch_s(launch, modules):
    running = launch(modules=modules, node1={"exit": 3}, node0={"alone": True})
    assert running.wait() == 3
    assert not (running.folder / "1.1").exists()


def test_a_leader_that_ends_well_ends_the_launch(launch):
    running = launch()
    os.kill(running.pid(0), signal.SIGTERM)
    assert running.wait() == 0


def test_a_host_of_followers_ends_when_they_were_told_to(launch):
    running = launch(ranks="2,3")
    running.node(2), running.node(3)
    (running.folder / "stop").touch()
    assert running.wait() == 0


def test_a_command_that_is_not_there_is_tried_again_until_asked_to_stop(tmp_path):
    command = [sys.executable, str(HERE / "supervised.py"), "-", "0", "30", "30", str(tmp_path / "nothing")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert "node_not_started node=0" in lines[0]
    assert "restart_in=0.0" in lines[1]
    assert "node_not_started node=0" in lines[2]


def test_ways_to_die_have_names():
    assert [how(code) for code in (0, 7, -9, -64, -50)] == [
        "exit code 0", "exit code 7", "SIGKILL", "SIGRTMAX", "signal 50",
    ]  # fmt: skip


async def test_a_heartbeat_beats_until_it_is_closed(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setenv("COMPUTRON_HEARTBEAT_FD", str(writer))
    monkeypatch.setenv("COMPUTRON_HEARTBEAT_SECONDS", "0.01")
    monkeypatch.setattr("computron.group.heartbeat.INTERVAL", 1000.0)
    beat = Heartbeat.from_environment()
    assert beat is not None
    assert "COMPUTRON_HEARTBEAT_FD" not in os.environ
    for _ in range(3):
        assert await asyncio.to_thread(os.read, reader, 1) == b"."
    beat.close()
    beat.close()
    while os.read(reader, 100):
        pass
    os.close(reader)


async def test_a_heartbeat_survives_a_listener_that_is_stopped_and_one_that_is_gone(monkeypatch):
    monkeypatch.setattr("computron.group.heartbeat.INTERVAL", 0.001)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, bytes(65536))
        except BlockingIOError:
            break
    beat = Heartbeat(writer)
    await asyncio.sleep(0.02)
    os.close(reader)
    await asyncio.sleep(0.02)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer)
    beat.close()


async def test_without_a_listener_there_is_no_heartbeat(monkeypatch):
    monkeypatch.delenv("COMPUTRON_HEARTBEAT_FD", raising=False)
    assert Heartbeat.from_environment() is None
