"""An aggregator takes no more memory than it may: for blocks, and for gradients that are pushed to it."""

from __future__ import annotations

import pytest

from computron.parameter_service.wire.messages import Failed, Host, Ready, Usage
from tests.parameter_service.aggregator.cluster import MIB, TOKEN, RawWorker, cluster, job

SPEC = job(((MIB // 4,),), optimizer="sgd", block_elements=MIB // 4)  # one block: a MiB, as its gradient


async def test_a_job_that_has_no_room_is_refused_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster("a", memory=MIB - 1) as master:
        await master.send("a", Host(SPEC, TOKEN, 1, (0,), (0,), 0, "worker"))
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "host"
        assert any(f"exceed the {MIB - 1}" in entry.getMessage() for entry in caplog.records)


async def test_gradients_that_are_pushed_take_room() -> None:
    async with cluster("a", memory=2 * MIB) as master:
        await master.host(SPEC, {"a": [0]}, members=(0, 1))
        sharing, pushing, another = (RawWorker(master, SPEC, rank, shared=rank == 0) for rank in (0, 1, 1))
        await sharing.join({"a": [0]})
        for worker in (pushing, another):  # who takes another's place takes its room, too
            await worker.join({"a": [0]})
            await worker.push(1)
            worker.kill()
        await master.heard(lambda who, m: isinstance(m, Usage) and m.memory == 2 * MIB)


async def test_who_pushes_gradients_that_have_no_room_is_refused() -> None:
    async with cluster("a", memory=2 * MIB - 1) as master:
        await master.host(SPEC, {"a": [0]}, members=(0, 1))
        sharing, pushing = (RawWorker(master, SPEC, rank, shared=rank == 0) for rank in (0, 1))
        await sharing.join({"a": [0]})
        await pushing.join({"a": [0]})
        await pushing.until(lambda: bool(pushing.refused))
        assert pushing.refused[0].code == "quota"
        assert "no room for the gradients that rank 1 pushes" in pushing.refused[0].message
        assert f"{2 * MIB - 1} that it may use" in pushing.refused[0].message
        assert not sharing.refused


async def test_a_block_moves_only_where_there_is_room_for_its_gradients_too() -> None:
    async with cluster("a") as master, cluster("b", memory=2 * MIB - 1) as other:
        master.addresses["b"] = other.addresses["b"]
        await master.host(SPEC, {"a": [0]})
        worker = RawWorker(master, SPEC, shared=False)
        await worker.join({"a": [0]})
        await master.move(SPEC, "a", "b", [0])
        ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "move"
        assert f"exceed the {2 * MIB - 1}" in failed.message


@pytest.mark.parametrize("shared", [True, False])
async def test_blocks_of_a_new_epoch_come_into_the_room_of_those_that_go(shared: bool) -> None:
    spec = job(((MIB // 4,), (MIB // 4,)), optimizer="sgd", block_elements=MIB // 4)
    room = (1 if shared else 2) * MIB
    async with cluster("a", memory=room) as master:
        await master.host(spec, {"a": [0]})
        worker = RawWorker(master, spec, shared=shared)
        await worker.join({"a": [0]})
        await master.heard(lambda who, m: isinstance(m, Usage) and m.memory == room)  # it has joined
        for epoch, blocks, fits in ((2, (0, 1), False), (3, (1,), True)):
            await master.send("a", Host(spec, TOKEN, epoch, (0,), blocks, 0, "worker"))
            ((_, answer),) = await master.heard(lambda who, m: isinstance(m, Failed | Ready))
            assert (answer.epoch, isinstance(answer, Ready)) == (epoch, fits)
