"""How groups of GPUs form and end: everything but NCCL itself, which is played and may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from computron.errors import GroupBroken
from computron.group import nccl
from computron.group.communicator import GroupCommunicator
from computron.group.nccl import NcclHangs
from computron.group.rendezvous import make_store
from computron.models.shard import Shard
from tests.group.conftest import HOST, PATIENCE, Threads

Make = Callable[[int, int], Threads]


class Nccl:
    """Makes groups as torch does. `hang`: until this is set, they do not connect."""

    def __init__(self) -> None:
        self.hang = threading.Event()
        self.hang.set()
        self.made: list[Any] = []
        self.aborted: list[Any] = []
        self.broken: set[int] = set()  # ranks for which no group can be made

    def group(self, store: dist.Store, rank: int, size: int, options: Any) -> Any:
        if rank in self.broken:
            raise RuntimeError("no such GPU")
        group = SimpleNamespace(rank=rank, size=size)
        group.eager_connect_single_device = lambda device: self._connect(group)
        group.abort = lambda: self.aborted.append(group)
        return group

    def _connect(self, group: Any) -> None:
        assert self.hang.wait(PATIENCE)
        self.made.append(group)


@pytest.fixture
def played(monkeypatch) -> Iterator[Nccl]:
    played = Nccl()
    group: Any = lambda *arguments: played.group(*arguments)  # noqa: E731
    group.Options = SimpleNamespace
    monkeypatch.setattr(dist, "ProcessGroupNCCL", group, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    yield played
    played.hang.set()


@pytest.fixture
def make(played) -> Iterator[Make]:
    """Groups that have not formed."""
    groups = []

    def make(tensor_parallel: int, pipeline_parallel: int) -> Threads:
        group = Threads(tensor_parallel, pipeline_parallel)
        group.communicators = [GroupCommunicator(c._shard, "cuda:0") for c in group.communicators]
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.close()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_group_forms_and_ends(make: Make, played: Nccl) -> None:
    group = make(2, 2)
    for times in (1, 2):
        group.form()
        assert len(played.made) == times * 8, "of each node: one in its stage, one with its neighbour"
        eventually(lambda times=times: len(played.aborted) == (times - 1) * 8)
    group.close()
    eventually(lambda: len(played.aborted) == 16)


def test_a_node_that_has_gone_ends_what_others_wait_for(make: Make, played: Nccl, monkeypatch) -> None:
    """NCCL itself would wait for ever: the GPU never gets done."""
    never = SimpleNamespace(record=lambda stream: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: never)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    group = make(3, 1)
    group.form()
    waiting = [group.start(rank, group.communicators[rank].settle) for rank in (0, 1)]
    group.communicators[2].abort("it ends")
    for each in waiting:
        with pytest.raises(GroupBroken, match=r"node \d is lost: it has ended the connection"):
            each.result(PATIENCE)
    eventually(lambda: len(played.aborted) == 3)


def test_who_cannot_connect_keeps_nobody_waiting(make: Make, played: Nccl) -> None:
    played.broken = {1}
    group = make(2, 1)
    store, port = make_store(HOST)
    forming = [group.start(rank, c.form, 1, HOST, port, 600.0) for rank, c in enumerate(group.communicators)]
    with pytest.raises(GroupBroken, match=r"epoch 1 was not formed: .* \(no such GPU\)"):
        forming[1].result(PATIENCE)
    with pytest.raises(GroupBroken, match="epoch 1 was not formed: node 1 is lost"):
        forming[0].result(PATIENCE)
    assert not played.made
    del store


def test_attempts_that_hang_are_counted_and_aborted_when_they_come_back(make: Make, played: Nccl) -> None:
    group = make(2, 1)
    played.hang.clear()
    for epoch in (1, 2):
        store, port = make_store(HOST)
        forming = [group.start(rank, c.form, epoch, HOST, port, 600.0) for rank, c in enumerate(group.communicators)]
        eventually(lambda epoch=epoch: nccl._initializing.count == 2 * epoch)
        for c in group.communicators:
            c.abort("it is late")
        for each in forming:
            with pytest.raises(GroupBroken, match=r"it is late|is lost"):
                each.result(PATIENCE)
        del store
    assert nccl._initializing.count > nccl.STUCK_LIMIT
    with pytest.raises(NcclHangs, match="4 attempts to form the group hang within NCCL"):
        group.communicators[0].form(3, HOST, 1, 600.0)
    played.hang.set()
    eventually(lambda: nccl._initializing.count == 0 and len(played.aborted) == len(played.made) == 4)
    store, port = make_store(HOST)
    group.each(lambda c, _: c.form(4, HOST, port, PATIENCE))
    assert len(played.aborted) == 4
    del store


def test_a_whole_model_needs_no_group() -> None:
    GroupCommunicator(Shard(), "cuda:0").form(1, HOST, 1, 1.0)
