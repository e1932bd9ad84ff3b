"""Two hosts that lose each other while the leader may still reach both: their nodes must not wait for ever."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from computron.group.rendezvous import make_store
from tests.end_to_end.hosts import ADDRESSES, CUTS, Hosts, two_hosts, why_not
from tests.group.processes import move

TIMEOUT = 2.0  # seconds
BROKEN = "GroupBroken: the connection to another node broke"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def group(hosts: Hosts, processes: Any) -> Callable[[int, int], list[Any]]:
    """A node on each host."""

    def form(tensor_parallel: int, pipeline_parallel: int) -> list[Any]:
        nodes = processes.group(tensor_parallel, pipeline_parallel)
        for node, name in zip(nodes, hosts.names, strict=True):
            node.run(f"move({name!r})")
        with ThreadPoolExecutor(1, initializer=move, initargs=hosts.names[:1]) as thread:
            store, port = thread.submit(make_store, ADDRESSES[0]).result()
        for node in nodes:
            node.start(f"c.form(1, {ADDRESSES[0]!r}, {port}, {TIMEOUT})")
        assert [node.result() for node in nodes] == [None, None]
        del store
        return nodes

    return form


@pytest.mark.parametrize("kind", ["link down", "all lost", "lost from leader", "lost to leader"])
def test_a_node_that_only_waits_notices_it(hosts: Hosts, group: Any, kind: str) -> None:
    nodes = group(1, 2)
    sever, heal = CUTS[kind]
    nodes[1].start("c.receive(torch.empty(3))")
    sever(hosts)
    try:
        assert nodes[1].result().startswith(BROKEN)
    finally:
        heal(hosts)


def test_nodes_whose_words_get_lost_notice_it(hosts: Hosts, group: Any) -> None:
    nodes = group(2, 1)
    sever, heal = CUTS["all lost"]
    sever(hosts)
    try:
        for node in nodes:
            node.start("c.all_reduce(torch.ones(2))")
        assert all(node.result().startswith(BROKEN) for node in nodes)
    finally:
        heal(hosts)


def test_a_node_that_is_stopped_is_waited_for(group: Any) -> None:
    """Its kernel answers, so the leader decides."""
    nodes = group(2, 1)
    nodes[1].kill(signal.SIGSTOP)
    nodes[0].start("c.all_reduce(torch.ones(2)).tolist()")
    time.sleep(2 * TIMEOUT)
    nodes[1].kill(signal.SIGCONT)
    nodes[1].start("c.all_reduce(torch.ones(2)).tolist()")
    assert [node.result() for node in nodes] == [[2.0, 2.0]] * 2
