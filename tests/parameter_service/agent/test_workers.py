"""Several workers, and everything that can happen to them while they train."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch

import computron.parameter_service as service
from computron.errors import JobRefused, ParameterServiceError
from computron.parameter_service.wire.messages import Enlist, Leave, MovedOut, Progress
from tests.parameter_service.agent.conftest import told
from tests.parameter_service.agent.test_one_worker import batches, loss, network, same


class Worker(threading.Thread):
    """One rank, stepped by the test; its batches are its own. gate: released once for each step."""

    def __init__(self, cluster, rank, workers, steps, shared=True, kind="AdamW", between=None, **arguments):
        super().__init__(daemon=True)
        self.model = network()
        self.settings = cluster.service(rank=rank, workers=workers, shared_memory=shared)
        self.rank, self.workers, self.steps, self.between = rank, workers, steps, between
        self.kind, self.arguments = kind, arguments or {"lr": 0.01}
        self.error = None
        self.rollbacks = []
        self.start()

    def run(self):
        try:
            optimizer = getattr(service, self.kind)(self.model.parameters(), service=self.settings, **self.arguments)
            self.optimizer = optimizer
            optimizer.on_rollback = lambda step, lost: self.rollbacks.append((step, lost))
            while optimizer.steps < self.steps:
                step = optimizer.steps
                loss(self.model, batch_of(self.rank, step)).backward()
                if self.between is not None:
                    self.between(self.rank, step)
                optimizer.step()
                optimizer.zero_grad()
            optimizer.close()
        except BaseException as error:
            self.error = error

    def finish(self):
        self.join(20)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def await_told(cluster, kind, count=1):
    """What is told to the master comes in another thread; of moves, on a busy machine, after the last step: their
    memory is made ready by a thread that gives way to all others.
    """
    deadline = time.monotonic() + 10
    while len(told(cluster, kind)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def batch_of(rank, step):
    return batches(20)[step].roll(rank + 1, 0)[: 8 + rank]


def reference(workers, steps, kind="AdamW", **arguments):
    """One process that sums in the order of ranks."""
    model = network()
    optimizer = getattr(torch.optim, kind)(model.parameters(), fused=True, **(arguments or {"lr": 0.01}))
    for step in range(steps):
        sums = None
        for rank in range(workers):
            model.zero_grad()
            loss(model, batch_of(rank, step)).backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
        for parameter, total in zip(model.parameters(), sums, strict=True):
            parameter.grad = total / workers
        optimizer.step()
    return model


@pytest.mark.parametrize("shared", [(True, True), (False, False), (True, False)], ids=["shared", "tcp", "mixed"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_workers_have_the_parameters_of_one_process(cluster, kind, shared):
    workers = [Worker(cluster, rank, 2, 6, shared[rank], kind) for rank in range(2)]
    for worker in workers:
        worker.finish()
    expected = reference(2, 6, kind)
    assert all(same(worker.model, expected) for worker in workers)
    await_told(cluster, Leave, 2)


@pytest.mark.parametrize("shared", [(True, True), (False, False), (True, False)], ids=["shared", "tcp", "mixed"])
def test_blocks_move_while_workers_train(cluster, shared):
    def between(rank, step):
        if rank == step % 2:
            cluster.move([step % 4, (step + 1) % 4], f"a{step // 2 % 2}")

    workers = [Worker(cluster, rank, 2, 12, shared[rank], between=between) for rank in range(2)]
    for worker in workers:
        worker.finish()
    expected = reference(2, 12)
    assert all(same(worker.model, expected) for worker in workers)
    await_told(cluster, MovedOut)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_broken_links_change_nothing(cluster, shared):
    def between(rank, step):
        if step % 3 == rank:
            cluster.break_links(f"a{step % 2}")
        if step == 4:
            cluster.disconnect_from_master()

    workers = [Worker(cluster, rank, 2, 8, shared, between=between) for rank in range(2)]
    for worker in workers:
        worker.finish()
    assert all(same(worker.model, reference(2, 8)) for worker in workers)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_a_new_epoch_loses_nothing_at_the_same_step(cluster, shared):
    def between(rank, step):
        if step % 2 and rank == 0:
            cluster.reconfigure(step)

    workers = [Worker(cluster, 0, 1, 8, shared, between=between)]
    for worker in workers:
        worker.finish()
    assert same(workers[0].model, reference(1, 8))
    assert workers[0].rollbacks == []


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_a_rollback_is_told_and_training_goes_on_from_there(cluster, shared):
    """The job's parameters are taken from the worker again, at an earlier step."""
    seen = []

    def between(rank, step):
        if step == 5 and not seen:
            seen.append([p.detach().clone() for p in worker.model.parameters()])
            cluster.reconfigure(3, source="worker")

    worker = Worker(cluster, 0, 1, 8, shared, "SGD", between, lr=0.1)
    worker.finish()
    assert worker.rollbacks == [(3, 2)]
    assert worker.optimizer.lost_steps == 2
    model = network()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), seen[0], strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for step in range(3, 8):
        optimizer.zero_grad()
        loss(model, batch_of(0, step)).backward()
        optimizer.step()
    assert same(worker.model, model)


def test_another_secret_is_refused(cluster):
    with service.SGD(network().parameters(), lr=0.1, service=cluster.service()):
        wrong = dataclasses.replace(cluster.service(), token="wrong")
        cluster.jobs["job"].began = False
        with pytest.raises(JobRefused, match="bad_token"):
            service.SGD(network().parameters(), lr=0.1, service=wrong)


def test_progress_is_reported(cluster):
    with service.SGD(network().parameters(), lr=0.1, service=cluster.service()):
        await_told(cluster, Progress)
    assert told(cluster, Progress)[0].job == "job"


def test_a_master_that_was_away_hears_how_far_the_worker_is(cluster):
    model = network()
    with service.SGD(model.parameters(), lr=0.1, service=cluster.service()) as optimizer:
        for step in range(3):
            loss(model, batch_of(0, step)).backward()
            optimizer.step()
        cluster.disconnect_from_master()
        await_told(cluster, Enlist, 2)
    assert [(enlist.epoch, enlist.step) for enlist in told(cluster, Enlist)] == [(0, 0), (1, 3)]


def test_an_optimizer_that_was_closed_says_so(cluster):
    model = network()
    optimizer = service.SGD(model.parameters(), lr=0.1, service=cluster.service())
    optimizer.close()
    optimizer.close()
    with pytest.raises(ParameterServiceError, match="job job was left"):
        optimizer.step()


def test_a_forked_process_cannot_use_it(cluster, monkeypatch):
    model = network()
    with service.SGD(model.parameters(), lr=0.1, service=cluster.service()) as optimizer:
        loss(model, batch_of(0, 0)).backward()
        with monkeypatch.context() as other:
            other.setattr("os.getpid", lambda: 1)
            with pytest.raises(RuntimeError, match="only in the process that made it"):
                optimizer.step()
        optimizer.step()


def test_a_long_wait_says_what_it_waits_for(cluster, monkeypatch, caplog):
    monkeypatch.setattr("computron.parameter_service.agent.session.PATIENCE", 0.05)
    monkeypatch.setattr("computron.parameter_service.agent.session.WAKE", 0.02)
    worker = Worker(cluster, 0, 2, 1)
    deadline = time.monotonic() + 10
    while "for the master's placement" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    Worker(cluster, 1, 2, 1).finish()
    worker.finish()


def test_a_worker_that_is_refused_by_the_master_says_why(cluster):
    wrong = dataclasses.replace(cluster.service(), master=f"{cluster.url}/nowhere")
    with pytest.raises(JobRefused, match="answers 404"):
        service.SGD(network().parameters(), lr=0.1, service=wrong)
