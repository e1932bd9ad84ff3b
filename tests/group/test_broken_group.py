"""Nodes that die, hang or never come, and groups that are ended on purpose."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from computron.errors import GroupBroken
from computron.group.communicator import GroupCommunicator
from computron.group.rendezvous import make_store
from computron.models.shard import Shard

HOST = "127.0.0.1"
REDUCE = "c.all_reduce(torch.full((2,), 1.0)).tolist()"


def form(processes: list[Any], epoch: int) -> list[Any]:
    """Let them form this epoch; what each says."""
    store, port = make_store(HOST)
    for process in processes:
        process.start(f"c.form({epoch}, {HOST!r}, {port}, 30)")
    said = [process.result() for process in processes]
    del store
    return said


def test_the_others_hear_at_once_of_a_killed_node(processes: Any) -> None:
    group = processes.group(3)
    assert form(group, 1) == [None] * 3
    for process in group[:2]:
        process.start(REDUCE)
    group[2].kill()
    for process in group[:2]:
        assert process.result().startswith("GroupBroken: the connection to another node broke")
        assert process.run(REDUCE).startswith("GroupBroken"), "a broken group stays broken"
    group[2] = processes.start(2, 3)
    assert form(group, 2) == [None] * 3
    for process in group:
        process.start(REDUCE)
    assert [process.result() for process in group] == [[3.0, 3.0]] * 3


def test_a_killed_stage_is_noticed_by_those_around(processes: Any) -> None:
    group = processes.group(1, 3)
    assert form(group, 1) == [None] * 3
    group[2].start("c.receive(torch.empty(3))")
    group[1].kill()
    assert group[2].result().startswith("GroupBroken")
    sends = [group[0].run("c.send(torch.ones(3))") for _ in range(50)]
    assert sends[-1].startswith("GroupBroken")


def test_a_stopped_node_holds_the_others_until_they_abort(processes: Any) -> None:
    group = processes.group(2, 2)
    assert form(group, 1) == [None] * 4
    group[1].kill(signal.SIGSTOP)
    group[0].start(REDUCE)
    group[3].start("c.receive(torch.empty(3))")
    time.sleep(0.1)
    for process in (group[0], group[3]):
        process.now("c.abort('node 1 hangs')")
        assert process.result() == "GroupBroken: node 1 hangs"
    group[1].kill(signal.SIGCONT)
    assert group[1].run(REDUCE) == [2.0, 2.0], "node 0 had sent its part before it gave up"
    assert group[1].run(REDUCE).startswith("GroupBroken: the connection to another node broke")
    assert form(group, 2) == [None] * 4
    for process in group:
        process.start(REDUCE)
    assert [process.result() for process in group] == [[2.0, 2.0]] * 4


def test_a_process_can_end_while_another_hangs() -> None:
    script = f"""
import os, signal, threading, time, torch
from computron.errors import GroupBroken
from computron.group.communicator import GroupCommunicator
from computron.group.rendezvous import make_store
from computron.models.shard import Shard
store, port = make_store({HOST!r})
reading, writing = os.pipe()
child = os.fork()
if not child:
    c = GroupCommunicator(Shard(2, 1))
    c.form(1, {HOST!r}, port, 30)
    os.kill(os.getpid(), signal.SIGSTOP)
c = GroupCommunicator(Shard(2, 0))
c.form(1, {HOST!r}, port, 30)
os.waitpid(child, os.WUNTRACED)
def compute():
    try:
        c.all_reduce(torch.ones(3))
    except GroupBroken as error:
        print(error)
threads = [threading.Thread(target=compute), threading.Thread(target=compute, daemon=True)]
threads[0].start()
time.sleep(0.1)
c.close()
threads[0].join()
os.kill(child, signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the communicator is closed\n", "")


def test_abort_wakes_this_node_and_the_others(threads: Callable[..., Any]) -> None:
    group = threads(2, 2)
    waiting = [
        group.start(0, group.communicators[0].all_reduce, torch.ones(1)),
        group.start(2, group.communicators[2].receive, torch.empty(1)),
    ]
    time.sleep(0.05)
    group.communicators[0].abort("enough")
    group.communicators[0].abort("once more")
    with pytest.raises(GroupBroken, match=r"^enough$"):
        waiting[0].result(30)
    with pytest.raises(GroupBroken, match="the connection to another node broke"):
        waiting[1].result(30)
    with pytest.raises(GroupBroken, match=r"^enough$"):
        group.communicators[0].all_reduce(torch.ones(1))
    group.form()
    assert [t.item() for t in group.each(lambda c, _: c.all_reduce(torch.ones(())))] == [2.0] * 4


def test_abort_wakes_a_node_within_a_large_exchange(threads: Callable[..., Any]) -> None:
    group = threads(2, 1)
    waiting = group.start(0, group.communicators[0].all_reduce, torch.ones(16 << 20))
    time.sleep(0.05)
    group.communicators[0].abort("enough")
    with pytest.raises(GroupBroken, match=r"^enough$"):
        waiting.result(30)


def test_abort_drops_what_nobody_receives(threads: Callable[..., Any]) -> None:
    group = threads(1, 2)
    for _ in range(4):
        group.start(0, group.communicators[0].send, torch.ones(4 << 20)).result(30)
    group.communicators[0].abort("enough")
    while any(thread.name in ("send-to-next-stage", "close-links") for thread in threading.enumerate()):
        time.sleep(0.005)
    with pytest.raises(GroupBroken, match=r"^enough$"):
        group.communicators[0].send(torch.ones(1))


def test_whoever_does_not_come_is_named() -> None:
    store, port = make_store(HOST)
    c = GroupCommunicator(Shard(2, 0, 2, 0))
    with pytest.raises(GroupBroken, match="epoch 7 was not formed: nodes 1, 2, 3 did not come"):
        c.form(7, HOST, port, 0.3)
    with pytest.raises(GroupBroken, match="nodes 1, 2, 3 did not come"):
        c.send(torch.ones(1))
    del store


def test_a_store_that_is_not_there_is_named() -> None:
    with socket.create_server((HOST, 0)) as full:
        port = full.getsockname()[1]
        with pytest.raises(GroupBroken, match=f"epoch 1 was not formed: .*{HOST}:{port}"):
            GroupCommunicator(Shard(2, 0)).form(1, HOST, port, 0.3)


def test_abort_ends_an_attempt_to_form(threads: Callable[..., Any]) -> None:
    group = threads(2, 1)
    store, port = make_store(HOST)
    forming = group.start(0, group.communicators[0].form, 2, HOST, port, 30.0)
    time.sleep(0.1)
    group.communicators[0].abort("never mind")
    with pytest.raises(GroupBroken, match="epoch 2 was not formed: never mind"):
        forming.result(30)
    with pytest.raises(GroupBroken, match="never mind"):
        group.communicators[0].all_reduce(torch.ones(1))
    group.form()
    del store


def test_nodes_that_lag_behind_form_with_the_others(threads: Callable[..., Any]) -> None:
    group = threads(2, 1)
    old, old_port = make_store(HOST)
    new, port = make_store(HOST)
    late = group.communicators[1]
    with ThreadPoolExecutor(1) as thread:
        lagging = thread.submit(late.form, 8, HOST, old_port, 30.0)
        time.sleep(0.05)
        first = group.start(0, group.communicators[0].form, 9, HOST, port, 30.0)
        time.sleep(0.05)
        assert not first.done()
        group.start(1, late.form, 9, HOST, port, 30.0).result(30)
        first.result(30)
        with pytest.raises(GroupBroken, match="epoch 9 is being formed"):
            lagging.result(30)
    assert [t.item() for t in group.each(lambda c, _: c.all_reduce(torch.ones(())))] == [2.0, 2.0]
    del old, new


def test_an_order_that_comes_late_does_not_end_a_later_epoch(threads: Callable[..., Any]) -> None:
    group = threads(2, 1)
    group.form()
    with pytest.raises(GroupBroken, match="epoch 1 is over: epoch 2 was called for since"):
        group.each(lambda c, _: c.form(1, HOST, 1, 30.0))
    assert [t.item() for t in group.each(lambda c, _: c.all_reduce(torch.ones(())))] == [2.0, 2.0]


def test_a_closed_communicator_stays_closed(threads: Callable[..., Any]) -> None:
    group = threads(2, 1)
    group.communicators[0].close()
    with pytest.raises(GroupBroken, match="closed"):
        group.communicators[0].all_reduce(torch.ones(1))
    with pytest.raises(GroupBroken, match="closed"):
        group.communicators[0].form(2, HOST, 1, 1.0)
