"""Blocks change hands while the job trains: nothing is lost, nothing is applied twice."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from computron.parameter_service.aggregator import moves, process
from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.specs import block_bytes
from computron.parameter_service.wire.link import LocalLink
from computron.parameter_service.wire.messages import Expect, Failed, Host, Hyperparameters, Kept
from tests.parameter_service.aggregator.cluster import MIB, RawWorker, Reference, cluster, job
from tests.parameter_service.aggregator.test_faults import until
from tests.parameter_service.aggregator.test_steps import ADAM, assert_equal, one_step, spread, started

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False,)], ids=str)
async def test_random_moves_at_random_moments_leave_the_parameters_right(kinds) -> None:
    chance = random.Random(7)
    spec = job(workers=len(kinds))
    reference = Reference(spec, **ADAM)
    owners = spread(reference, *NAMES)
    where = {index: name for name, indices in owners.items() for index in indices}
    async with cluster(*NAMES) as master:
        workers = await started(master, spec, reference, kinds, owners)
        for step in range(1, 25):
            orders: dict[tuple[str, str], list[int]] = {}
            for index in chance.sample(sorted(where), chance.randrange(len(where))):
                to = chance.choice([name for name in NAMES if name != where[index]])
                orders.setdefault((where[index], to), []).append(index)
                where[index] = to
            for (source, to), indices in orders.items():
                await master.move(spec, source, to, indices)
            await one_step(workers, reference, step, ADAM)
            assert_equal(workers, reference)
            await master.moved(sum(map(len, orders.values())))
        for worker in workers:
            await worker.until(lambda worker=worker: worker.owner == where)
        state = [reference.optimizer.state[p]["exp_avg"] for p in reference.parameters]
        assert torch.equal(await workers[0].read("exp_avg"), reference.flat(state))


async def test_a_block_whose_step_somebody_committed_leaves_after_that_step() -> None:
    spec = job(workers=2)
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True, True), spread(reference, "a"))
        gradients = [reference.gradients(), reference.gradients()]
        for worker, mine in zip(workers, gradients, strict=True):
            worker.gradient.copy_(reference.flat(mine))
        await workers[0].commit(1, Hyperparameters(**ADAM))
        await master.move(spec, "a", "b", [0])
        await workers[1].commit(1, Hyperparameters(**ADAM))
        for worker in workers:
            await worker.answered(1)
        await master.moved(1)
        reference.step(gradients)
        assert_equal(workers, reference)
        await one_step(workers, reference, 2, ADAM)
        assert_equal(workers, reference)


@pytest.mark.parametrize("at_once", [1, MIB])
async def test_between_machines_states_travel_as_bytes(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(moves, "AT_ONCE", at_once)
    monkeypatch.setattr(process, "machine_id", lambda: uuid.uuid4().hex)
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (False,), spread(reference, "a"))
        blocks = range(len(reference.layout.blocks))
        for step, (source, to) in enumerate([("a", "b"), ("b", "a")] * 2, 1):
            await one_step(workers, reference, step, ADAM)
            await master.move(spec, source, to, blocks)
            await master.moved(len(blocks))
        await one_step(workers, reference, 5, ADAM)
        assert_equal(workers, reference)
        state = [reference.optimizer.state[p]["exp_avg_sq"] for p in reference.parameters]
        assert torch.equal(await workers[0].read("exp_avg_sq"), reference.flat(state))


async def test_blocks_that_leave_one_by_one_all_arrive_while_the_job_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "AT_ONCE", 1)
    monkeypatch.setattr(process, "machine_id", lambda: uuid.uuid4().hex)
    spec = job()
    reference = Reference(spec, **ADAM)
    count = len(reference.layout.blocks)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (False, False), spread(reference, "a"))
        await master.move(spec, "a", "b", range(count))
        for step in range(1, count + 1):
            await one_step(workers, reference, step, ADAM)
            assert_equal(workers, reference)
        await master.moved(count)
        assert set(workers[0].owner.values()) == {"b"}


async def test_what_has_no_room_elsewhere_stays() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master, cluster("b", memory=1000) as other:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        master.addresses["b"] = other.addresses["b"]
        await master.move(spec, "a", "b", [0, 1])
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "move"
        assert "exceed the 1000" in failed.message
        await one_step(workers, reference, 1, ADAM)
        assert_equal(workers, reference)
        assert set(workers[0].owner.values()) == {"a"}


async def test_moves_that_come_at_once_share_the_room_that_is_there() -> None:
    specs = [msgspec.structs.replace(job(), job=name) for name in ("one", "two")]
    reference = Reference(specs[0], **ADAM)
    room = int(1.5 * sum(block_bytes(specs[0], block) for block in reference.layout.blocks))
    async with cluster("a", "c") as master, cluster("b", memory=room) as other:
        master.addresses["b"] = other.addresses["b"]
        for spec, who in zip(specs, "ac", strict=True):
            await master.host(spec, spread(reference, who))
        for spec, who in zip(specs, "ac", strict=True):
            worker = RawWorker(master, spec)
            await worker.join(spread(reference, who))
            await worker.initialise(reference.flat())
            await master.move(spec, who, "b", range(len(reference.layout.blocks)))
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "move"
        assert f"exceed the {room}" in failed.message


async def test_who_is_gone_gets_nothing() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        async with cluster("b") as other:
            master.addresses["b"] = other.addresses["b"]
        await master.move(spec, "a", "b", [0])
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert "cannot be reached" in failed.message
        await one_step(workers, reference, 1, ADAM)
        assert_equal(workers, reference)


@pytest.mark.parametrize("wrong", [OSError(24, "Too many open files"), RuntimeError("a mistake")], ids=repr)
async def test_a_move_that_cannot_be_announced_fails(monkeypatch: pytest.MonkeyPatch, wrong: Exception) -> None:
    send = LocalLink.send

    def failing(self, message, **more):
        if isinstance(message, Expect):
            raise wrong
        send(self, message, **more)

    monkeypatch.setattr(LocalLink, "send", failing)
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        await master.move(spec, "a", "b", [0])
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "move"
        assert "b could not be told" in failed.message
        await one_step(workers, reference, 1, ADAM)
        assert_equal(workers, reference)


async def test_a_limit_that_was_told_before_the_job_came_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[Callable[[], None]] = []
    monkeypatch.setattr(Pages, "touch", lambda self, segments, then: mapped.append(then))
    spec = job(workers=1, snapshot_every=1)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a", "b", folder=tmp_path) as master:
        await master.host(spec, owners, kept=0)
        worker = RawWorker(master, spec)
        await worker.join(owners)
        await worker.initialise(reference.flat())
        await one_step([worker], reference, 1, ADAM)
        mapped.clear()
        await master.move(spec, "a", "b", [0])
        await until(lambda: bool(mapped))
        await master.send("a", Kept(spec.job, 1))
        await master.move(spec, "a", "b", [1], epoch=9)
        await master.heard(lambda who, m: isinstance(m, Failed) and m.order == "move")  # it knows what came before
        for then in mapped:
            then()
        await master.moved(1)
        await one_step([worker], reference, 2, ADAM)
        assert_equal([worker], reference)


async def test_a_host_has_room_for_so_much() -> None:
    spec = job(((MIB,),), block_elements=1 << 20)
    async with cluster("a", memory=2 * MIB) as master:
        worker = RawWorker(master, spec)
        await master.send("a", Host(spec, "secret", 1, (0,), (0,), 0, "worker"))
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert (failed.order, failed.epoch) == ("host", 1)
        await worker.join({"a": [0]})
        await worker.until(lambda: bool(worker.refused))
        assert worker.refused[0].code == "unknown_job"
