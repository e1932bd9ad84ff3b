"""A group under `computron launch` and under load: whatever dies is back by itself, and nobody gets a wrong answer."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from computron.group.supervision import REPEATED
from tests.end_to_end.launched import (
    Launch,
    checkpoint,
    configuration,
    eventually,
    launched,
    none_left,
    ready,
    runs,
    signal_node,
    stopped,
)
from tests.end_to_end.load import BROKEN, HUNG, REFUSED, RIGHT, WRONG, Clients, counted
from tests.ports import ports_in_a_row

NODES = 4
NODE_TIMEOUT = 2.0  # seconds
RECOVERY = 60.0  # seconds for what takes a few
ON_THE_WAY = 0.5  # seconds in which a request has reached the server
WHY = re.compile(r"waiting for nodes? |still loading|are finding each other|its models are being loaded")

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Served:
    """A launched group of 2 x 2 nodes, and clients who know its answers."""

    def __init__(self, launch: Launch, clients: Clients, folder: Path) -> None:
        self.launch = launch
        self.clients = clients
        self.folder = folder

    async def back(self, fault: str, since: float) -> None:
        """Wait until requests are answered again, and tell how long that took."""
        try:
            answered = await self.clients.answered(since, RECOVERY, count=4)
        except TimeoutError:
            raise AssertionError(f"no answers after: {fault}\n{self.launch.log}") from None
        first = await self.clients.answered(since, RECOVERY)
        print(f"\n{fault}: answers again after {first - since:.2f} s; {counted(self.clients.outcomes, since)}", end=" ")
        assert answered >= first

    def check(self, *, leader_died: bool = False) -> None:
        """Every request was answered rightly, or refused in words, or lost with its leader."""
        clients = self.clients
        assert not clients.of(WRONG, HUNG)
        assert leader_died or not clients.of(BROKEN)
        for outcome in clients.of(REFUSED):
            assert WHY.search(outcome.detail), outcome.detail
        assert clients.of(RIGHT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory) -> AsyncIterator[Served]:
    path = tmp_path_factory.mktemp("launch")
    folder, port = checkpoint(path / "llama"), ports_in_a_row(NODES)
    config = configuration(path / "serve.toml", folder, 2, 2, port=port, node_timeout=NODE_TIMEOUT)
    async with launched(config, path / "log") as launch:
        url = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        await ready(url, launch)
        print(f"\nready after {time.monotonic() - began:.2f} s", end=" ")
        clients = Clients(url)
        await clients.learn()
        yield Served(launch, clients, folder)


@pytest.mark.parametrize("rank", [1, 2, 3, 0])
async def test_a_killed_node_is_back_by_itself(served, rank):
    launch, clients = served.launch, served.clients
    others = {other: launch.pid(other) for other in range(NODES) if other != rank}
    async with clients.asking():
        await clients.answered(0, RECOVERY, count=3)
        killed = time.monotonic()
        signal_node(launch, rank, signal.SIGKILL)
        await served.back(f"SIGKILL of node {rank}", killed)
    served.check(leader_died=rank == 0)
    assert {other: launch.pid(other) for other in others} == others
    if rank:
        named = [set(map(int, re.findall(r"\d+", words))) for words in _missing(clients)]
        assert all(ranks == {rank} for ranks in named), named


@pytest.mark.parametrize("rank", [2, 0])
async def test_a_stopped_node_is_killed_and_started_again(served, rank):
    launch, clients = served.launch, served.clients
    pids = [launch.pid(other) for other in range(NODES)]
    async with clients.asking():
        await clients.answered(0, RECOVERY, count=3)
        at = time.monotonic()
        signal_node(launch, rank, signal.SIGSTOP)
        await served.back(f"SIGSTOP of node {rank}", at)
    served.check(leader_died=rank == 0)
    assert f"node_hung node={rank} pid={pids[rank]}" in launch.log
    assert not stopped(pids[rank])
    assert [other for other in range(NODES) if launch.pid(other) != pids[other]] == [rank]


async def test_a_node_without_its_checkpoint_is_tried_until_it_is_there(served):
    launch, clients = served.launch, served.clients
    away = served.folder.with_name("away")
    async with clients.asking():
        await clients.answered(0, RECOVERY, count=3)
        at = time.monotonic()
        served.folder.rename(away)
        try:
            signal_node(launch, 3, signal.SIGKILL)
            refusal = await clients.refused(RECOVERY, "node 3 could not start", str(served.folder))
        finally:
            away.rename(served.folder)
        back = time.monotonic()
        assert not any(o.kind == RIGHT and o.asked > at for o in clients.outcomes)
        await served.back(f"checkpoint of node 3 away for {back - at:.1f} s", back)
    served.check()
    assert refusal.detail.count(str(served.folder)) == 1


async def test_stopping_lets_open_requests_end_and_leaves_no_process(served):
    launch, clients = served.launch, served.clients
    everything = launch.processes()
    assert len(everything) == 1 + 1 + NODES  # the supervisor and the process that nodes are forked from
    async with clients.asking():
        await clients.answered(0, RECOVERY, count=3)
        at = time.monotonic()
        launch.stop()
        assert await launch.ended() == 0
    open_then = [o for o in clients.outcomes if o.asked < at < o.ended]
    print(f"\nSIGTERM: ended after {time.monotonic() - at:.2f} s; open then: {counted(open_then)}", end=" ")
    # What was still on its way to the server when it was told to stop may be refused, in clear words (below).
    assert RIGHT in {outcome.kind for outcome in open_then}
    assert all(outcome.kind == RIGHT for outcome in open_then if outcome.asked < at - ON_THE_WAY), open_then
    await none_left(everything, launch)
    for outcome in clients.of(REFUSED):
        assert outcome.detail == "the server is shutting down"
    assert not clients.of(WRONG, HUNG)


@pytest.fixture
def small(served, tmp_path) -> tuple[Path, str]:
    """The configuration of two nodes, and where they will serve."""
    port = ports_in_a_row(2)
    config = configuration(tmp_path / "serve.toml", served.folder, 2, 1, port=port, node_timeout=10.0)
    return config, f"http://127.0.0.1:{port}"


async def test_a_leader_that_dies_while_it_starts_is_started_again(small, tmp_path):
    config, url = small
    async with launched(config, tmp_path / "log") as launch:
        await eventually(lambda: bool(launch.starts(1)), "all nodes are started", launch)
        follower = launch.pid(1)
        await asyncio.sleep(0.2)
        signal_node(launch, 0, signal.SIGKILL)
        await ready(url, launch)
        await Clients(url).learn()
        assert (len(launch.starts(0)), launch.starts(1)) == (2, [follower])


async def test_a_killed_supervisor_leaves_no_process(small, tmp_path):
    config, url = small
    async with launched(config, tmp_path / "log") as launch:
        await ready(url, launch)
        everything = launch.processes()
        assert len(everything) == 1 + 1 + 2
        at = time.monotonic()
        launch.process.kill()
        await none_left(everything, launch)
        print(f"\nSIGKILL of the supervisor: all gone after {time.monotonic() - at:.2f} s", end=" ")


async def test_a_second_interrupt_kills_what_is_left(small, tmp_path):
    config, url = small
    clients = Clients(url)
    async with launched(config, tmp_path / "log") as launch:
        await ready(url, launch)
        everything = launch.processes()
        signal_node(launch, 1, signal.SIGSTOP)  # with it, no request can end
        async with clients.asking():
            await asyncio.sleep(0.2)
            launch.process.send_signal(signal.SIGINT)
            await eventually(lambda: "shutdown signal=SIGTERM" in launch.log, "the leader drains", launch)
            await asyncio.sleep(2 * REPEATED)
            assert all(map(runs, everything))
            launch.process.send_signal(signal.SIGINT)
            assert await launch.ended() == 128 + signal.SIGINT
        await none_left(everything, launch)
    assert clients.of(BROKEN)
    assert not clients.of(RIGHT, WRONG, HUNG)


def _missing(clients: Clients) -> list[str]:
    """What refusals said about who is not there."""
    found = [re.search(r"nodes? ([\d, ]+)(?: \(of| still)|$", outcome.detail) for outcome in clients.of(REFUSED)]
    return [match[1] for match in found if match is not None and match[1]]
