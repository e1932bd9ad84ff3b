"""Workers clip their gradient together, whatever happens to the blocks meanwhile."""

from __future__ import annotations

import time

import pytest
import torch

import computron.parameter_service as service
from computron.parameter_service.wire.messages import MovedOut
from tests.parameter_service.agent.test_one_worker import loss, network, same
from tests.parameter_service.agent.test_workers import Worker, await_told, batch_of

NORM = 0.05


class Clipper(Worker):
    """times: how often it clips in a step."""

    times = 1

    def run(self):
        try:
            optimizer = service.SGD(self.model.parameters(), service=self.settings, lr=0.1)
            while optimizer.steps < self.steps:
                step = optimizer.steps
                loss(self.model, batch_of(self.rank, step)).backward()
                for _ in range(self.times):
                    if self.between is not None:
                        self.between(self.rank, step)
                    optimizer.clip_grad_norm_(NORM)
                optimizer.step()
                optimizer.zero_grad()
            optimizer.close()
        except BaseException as error:
            self.error = error


class ClipsTwice(Clipper):
    times = 2


def reference(steps):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        (sum(loss(model, batch_of(rank, step)) for rank in range(2)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
    return model


def close_to(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("shared", [(True, True), (False, False), (True, False)], ids=["shared", "tcp", "mixed"])
@pytest.mark.parametrize("kind", [Clipper, ClipsTwice])
def test_blocks_move_while_norms_are_asked_for(cluster, kind, shared):
    def between(rank, step):
        if rank == step % 2 and step:
            time.sleep(0.01)  # gradients have been pushed
            cluster.move([step % 4, (step + 1) % 4], f"a{step // 2 % 2}")
            time.sleep(0.02)  # the other aggregator expects them

    workers = [kind(cluster, rank, 2, 10, shared[rank], between=between) for rank in range(2)]
    for worker in workers:
        worker.finish()
    assert same(workers[0].model, workers[1].model)
    assert close_to(workers[0].model, reference(10))
    await_told(cluster, MovedOut)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_links_break_and_epochs_begin_while_norms_are_asked_for(cluster, shared):
    def between(rank, step):
        if rank == 0 and step % 2:
            cluster.break_links(f"a{step % 4 // 2}")
        elif rank == 0:
            cluster.reconfigure(step)

    workers = [Clipper(cluster, rank, 2, 8, shared, between=between) for rank in range(2)]
    for worker in workers:
        worker.finish()
    assert same(workers[0].model, workers[1].model)
    assert close_to(workers[0].model, reference(8))
