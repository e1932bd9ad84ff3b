"""Which GPU a node of a group uses, where nothing else tells: played without one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from computron.group import communicator
from computron.group.communicator import GroupCommunicator
from computron.group.nccl import NcclLinks
from computron.models.shard import Shard

GPU = torch.device("cuda:3")


def test_the_group_forms_on_the_nodes_own_gpu(monkeypatch):
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    used: list[torch.device] = []

    class Links:
        def abort(self) -> None: ...

    def connect(meeting: Any, device: torch.device) -> Links:
        used.append(current.device)
        return Links()

    monkeypatch.setattr(communicator, "connect_nccl", connect)
    GroupCommunicator(Shard(2, 0), GPU).form(1, "127.0.0.1", 1, 30.0)
    assert used == [GPU]


@pytest.fixture
def links(monkeypatch) -> NcclLinks:
    """What is recorded on the stream of GPU 3 is done at the third look; on others at once."""

    class Event:
        def record(self, stream: Any) -> None:
            assert stream == "the stream of cuda:3"
            self.looks = 0

        def query(self) -> bool:
            self.looks += 1
            return self.looks > 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    return NcclLinks(0, 2, GPU)


def test_results_are_waited_for_on_the_nodes_own_gpu(links):
    links.settle()


def test_an_epoch_that_is_aborted_does_not_settle(links):
    links.abort()
    with pytest.raises(ConnectionAbortedError):
        links.settle()
