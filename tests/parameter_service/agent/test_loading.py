"""Workers load a state: all of them have it afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

import computron.parameter_service as service
from computron.parameter_service.agent.progress import Progress
from computron.parameter_service.agent.waiting import waits_for
from computron.parameter_service.wire.messages import Placement
from tests.parameter_service.agent.test_one_worker import network

STEPS = 7.0  # that the state which is loaded has seen


def checkpoint(model):
    states = {
        index: {"step": torch.tensor(STEPS), "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p) * 2}
        for index, p in enumerate(model.parameters())
    }
    return {**torch.optim.AdamW(model.parameters()).state_dict(), "state": states}


class Loader(threading.Thread):
    """Loads a checkpoint before its first step, with parameters that are its rank."""

    def __init__(self, cluster, rank, workers, shared):
        super().__init__(daemon=True)
        self.model = network()
        self.settings = cluster.service(rank=rank, workers=workers, shared_memory=shared)
        self.rank = rank
        self.leave = threading.Event()
        self.start()

    def run(self):
        with service.AdamW(self.model.parameters(), service=self.settings) as optimizer:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.fill_(42.0 + self.rank)
            optimizer.load_state_dict(checkpoint(self.model))
            self.state = optimizer.state_dict()["state"]
            self.leave.wait(20)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_all_workers_have_what_the_first_one_loaded(cluster, shared):
    workers = [Loader(cluster, rank, 2, shared) for rank in range(2)]
    for worker in workers:
        while not hasattr(worker, "state"):
            assert worker.is_alive()
    for worker in workers:
        if not shared:  # what they share was filled by both
            assert all(bool((p == 42.0).all()) for p in worker.model.parameters())
        assert all(float(state["step"]) == STEPS for state in worker.state.values())
        assert len(worker.state) == len(list(worker.model.parameters()))
        assert all(bool((state["exp_avg_sq"] == 2).all()) for state in worker.state.values())
    for worker in workers:
        worker.leave.set()
        worker.join(20)
        assert not worker.is_alive()


def test_a_load_is_brought_again_in_a_newer_epoch(cluster):
    """The first epoch of the load ends before its aggregators have answered."""
    original, begun = cluster._reconfigure, []

    async def twice(*arguments):
        if len(arguments) == 6 and arguments[5]:
            begun.append(arguments)
            await original(*arguments)
        await original(*arguments)

    cluster._reconfigure = twice
    worker = Loader(cluster, 0, 1, True)
    while not hasattr(worker, "state"):
        assert worker.is_alive()
    assert len(begun) == 1
    assert all(bool((p == 42.0).all()) for p in worker.model.parameters())
    assert all(float(state["step"]) == STEPS for state in worker.state.values())
    worker.leave.set()
    worker.join(20)


def test_a_wait_says_whom_a_load_waits_for():
    progress = Progress("job", "", "a", 0)
    progress.placed(Placement("job", 1, 0, (0, 1), (), ()))
    assert waits_for(progress, 1) == "the other workers to load a state, too"
    progress.placed(Placement("job", 2, 0, (0, 1), (), (), loads=1, loading=True))
    assert waits_for(progress, 1) == "the state that is loaded to be in a snapshot"
