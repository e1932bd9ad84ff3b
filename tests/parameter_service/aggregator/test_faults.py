"""Links break, processes freeze, orders are withdrawn: nothing counts twice, and nothing is kept for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from computron.parameter_service.aggregator.compute import Work
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.aggregator.kernels import Kernel
from computron.parameter_service.aggregator.moves import Moves
from computron.parameter_service.aggregator.orders import Orders
from computron.parameter_service.aggregator.saving import Saver
from computron.parameter_service.aggregator.server import Server
from computron.parameter_service.wire.frames import frame
from computron.parameter_service.wire.link import LocalLink, connect
from computron.parameter_service.wire.messages import (
    Adopt,
    Adopted,
    Complete,
    Drop,
    Failed,
    Hyperparameters,
    MovedOut,
    Push,
    Ready,
    Refused,
    WorkerLost,
    Write,
)
from tests.parameter_service.aggregator.cluster import RawWorker, Reference, cluster, job
from tests.parameter_service.aggregator.test_reconfiguration import rejoin
from tests.parameter_service.aggregator.test_steps import ADAM, assert_equal, one_step, spread, started

HYPER = Hyperparameters(**ADAM)


async def until(what) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """Those of all aggregators of the test."""
    made: list[Server] = []
    make = Server.__init__

    def noted(self: Server, *args: Any) -> None:
        make(self, *args)
        made.append(self)

    monkeypatch.setattr(Server, "__init__", noted)
    return made


async def until_a_payload_comes(servers: list[Server]) -> None:
    await until(lambda: any(server._directed for server in servers))


async def test_a_block_that_is_lost_on_its_way_is_said_to_be_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    send, cut = LocalLink.send, []

    def lossy(self, message, **more):
        if isinstance(message, Adopt) and not cut:
            cut.append(message)
            self._end("cut")
        else:
            send(self, message, **more)

    monkeypatch.setattr(LocalLink, "send", lossy)
    spec = job()
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True,), owners)
        await one_step(workers, reference, 1, ADAM)
        await master.move(spec, "a", "b", [0])
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert (failed.order, failed.epoch) == ("move", 1)
        held = await master.hold(spec, 2, "a", "b")
        assert held["a"].leaving == (0,)
        assert {block.block for block in held["a"].blocks} == set(owners["a"])
        assert not held["b"].blocks
        await master.host(spec, owners, epoch=2, source="keep", applied=1)
        workers[0].owner[0] = "a"
        await rejoin(workers, owners, 2)
        await one_step(workers, reference, 2, ADAM)
        assert_equal(workers, reference)


async def test_what_is_kept_of_a_move_is_out_of_reach_of_who_was_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moves, "adopted", lambda *arguments: None)  # it lies in the socket
    spec = job()
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True,), owners)
        worker = workers[0]
        await one_step(workers, reference, 1, ADAM)
        await master.move(spec, "a", "b", [0])
        await worker.until(lambda: worker.owner[0] == "b")
        gradients = reference.gradients()
        worker.gradient.copy_(reference.flat(gradients))
        await worker.commit_at("a", 2, HYPER)
        await worker.until(lambda: all(worker.applied[index] == 2 for index in owners["a"][1:]))
        held = await master.hold(spec, 2, "a")
        await master.complete(spec, 2, "a", 2, [0], held["a"].commits)
        await worker.commit_at("b", 2, HYPER)  # b was stopped, and knows of no new epoch
        await worker.until(lambda: worker.applied[0] == 2)
        await master.host(spec, owners, epoch=2, source="keep", applied=2)
        worker.owner[0] = "a"
        before = worker._segments.copy()
        await rejoin(workers, owners, 2)
        await worker.until(lambda: worker._segments[0] is not before[0])
        reference.step([gradients])
        await worker.answered(2)
        assert_equal(workers, reference)


async def test_only_who_was_asked_can_refuse_a_move() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        workers[0].gradient.zero_()
        await master.move(spec, "a", "b", [0])
        stranger = RawWorker(master, spec, 1)
        (await stranger.link("a")).send(Refused(spec.job, "bad_token", "no"))
        await master.heard(lambda who, m: isinstance(m, MovedOut))
        await master.hold(spec, 2, "a")
        assert not [message for _, message in master.told if isinstance(message, Failed)]


async def test_orders_at_once_to_the_same_aggregator_take_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    async def counted(address, receiver, *, machine):
        await asyncio.sleep(0.05)
        link = await connect(address, receiver, machine=machine)
        made.append(link)
        return link

    monkeypatch.setattr("computron.parameter_service.aggregator.moves.connect", counted)
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        await master.move(spec, "a", "b", [0])
        await master.move(spec, "a", "b", [1])
        await master.moved(2)
        assert len(made) == 1
        await one_step(workers, reference, 1, ADAM)
        assert_equal(workers, reference)


async def test_a_step_whose_completion_was_withdrawn_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    go_on = threading.Event()
    async with cluster("a", "b", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), owners)
        worker = workers[0]
        worker.gradient.copy_(reference.flat(reference.gradients()))
        await worker.commit_at("a", 1, HYPER, version="v1")
        await worker.until(lambda: len(worker.applied) == len(owners["a"]))
        held = await master.hold(spec, 2, "a", "b")
        began, apply = threading.Event(), Kernel.apply

        def slow(self, *arguments):
            began.set()
            assert go_on.wait(10)
            apply(self, *arguments)

        saved = []
        monkeypatch.setattr(Kernel, "apply", slow)
        monkeypatch.setattr(Saver, "save", lambda self, *what: saved.append(what))
        await master.send("b", Complete(spec.job, 2, 1, tuple(owners["b"]), held["a"].commits))
        await until(began.is_set)
        holding = asyncio.create_task(master.hold(spec, 3, "b"))
        await asyncio.sleep(0.1)
        go_on.set()
        await holding
        await master.hold(spec, 4, "b")
        assert not saved


@pytest.mark.parametrize("skip", [False, True])
async def test_a_step_is_not_completed_with_gradients_that_have_not_come_again(
    servers: list[Server], skip: bool
) -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    indices = spread(reference, "a")["a"]
    owners = {"a": indices[1:], "b": indices[:1]}
    async with cluster("a", "b") as master:
        (worker,) = await started(master, spec, reference, (False,), owners)
        worker.gradient.copy_(reference.flat(reference.gradients()))
        await worker.push(1)
        await worker.commit_at("a", 1, HYPER, skip=skip)
        await worker.until(lambda: len(worker.applied) == len(owners["a"]))
        worker._links.pop("b").close()
        await master.heard(lambda who, m: isinstance(m, WorkerLost))
        link = await worker.link("b")
        data = bytes(reference.layout.blocks[0].nbytes)
        link._transport.write(frame(Push(spec.job, 1, 1, 0), len(data)) + data[: len(data) // 2])
        await until_a_payload_comes(servers)
        held = await master.hold(spec, 2, "a", "b")
        await master.send("b", Complete(spec.job, 2, 1, (0,), held["a"].commits))
        ((_, answer),) = await master.heard(lambda who, m: isinstance(m, Failed | Ready) and m.epoch == 2)
        assert isinstance(answer, Ready if skip else Failed)


async def test_a_write_that_is_still_coming_when_an_epoch_begins_changes_nothing(servers: list[Server]) -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (False,), owners)
        await one_step(workers, reference, 1, ADAM)
        link = await workers[0].link("a")
        values = torch.full((reference.layout.blocks[0].elements,), 7.0).view(torch.uint8).numpy().data
        head = frame(Write(spec.job, 1, 0, "parameters", 1, True), len(values))
        link._transport.write(head + bytes(values[:64]))
        await until_a_payload_comes(servers)
        await master.hold(spec, 2, "a")
        link._transport.write(bytes(values[64:]))
        await workers[0].until(lambda: bool(workers[0].refused))
        assert workers[0].refused.pop().code == "stale_epoch"
        await master.host(spec, owners, epoch=2, source="keep", applied=1)
        await rejoin(workers, owners, 2)
        await one_step(workers, reference, 2, ADAM)
        assert_equal(workers, reference)


async def test_nothing_is_left_of_a_job_that_was_dropped(servers: list[Server]) -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True, False), spread(reference, "a"))
        await one_step(workers, reference, 1, ADAM)
        jobs = weakref.WeakSet(servers[0]._jobs.values())
        await master.send("a", Drop(spec.job))
        await until(lambda: not servers[0]._workers)
        for worker in workers:
            worker.kill()

        def gone() -> bool:
            gc.collect()
            return not jobs

        await until(gone)


async def test_others_work_that_was_done_before_keeps_no_job_that_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[Server] = []
    make = Server.__init__
    monkeypatch.setattr(Server, "__init__", lambda self, *a: (make(self, *a), servers.append(self))[0])
    spec = job()
    async with cluster("a") as master:
        await master.host(spec, {"a": [0]})
        (server,) = servers
        began, go_on = threading.Event(), threading.Event()
        other = Job(spec, "secret", 1, (0,), Reference(spec, **ADAM).layout)
        server.steps.compute.submit(
            Work(other, 0.0, 1.0, 0.0, lambda: began.set() or go_on.wait(10), lambda work: None)
        )
        await until(began.is_set)
        await master.send("a", Drop(spec.job))
        await until(lambda: not server._jobs)
        go_on.set()
        await until(lambda: not server.steps.compute._waiting)
        await until(lambda: not server.steps.compute._behind)


async def test_a_block_is_said_to_have_come_before_a_step_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    adopt, send = Orders.adopt, LocalLink.send

    def noted(self, message, **more):
        if isinstance(message, Adopted):
            said.append("said")
        send(self, message, **more)

    monkeypatch.setattr(LocalLink, "send", noted)
    monkeypatch.setattr(Orders, "adopt", lambda self, *what: (said.append("adopted"), adopt(self, *what)))
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        await started(master, spec, reference, (True,), spread(reference, "a"))
        await master.move(spec, "a", "b", [0])
        await master.moved(1)
        assert said == ["said", "adopted"]


async def test_what_goes_wrong_with_one_job_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Orders._ready

    def wrong(self, job: Job, epoch: int, blocks) -> None:
        if epoch == 2:
            raise RuntimeError("a mistake")
        ready(self, job, epoch, blocks)

    monkeypatch.setattr(Orders, "_ready", wrong)
    spec = job()
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True,), owners)
        await one_step(workers, reference, 1, ADAM)
        await master.hold(spec, 2, "a")
        hosting = asyncio.create_task(master.host(spec, owners, epoch=2, source="keep", applied=1))
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert (failed.order, failed.epoch) == ("step", 2)
        assert "a mistake" in failed.message
        hosting.cancel()
        await master.host(spec, owners, epoch=3, source="keep", applied=1)
        await rejoin(workers, owners, 3)
        await one_step(workers, reference, 2, ADAM)
        assert_equal(workers, reference)
