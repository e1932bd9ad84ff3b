"""Who sends what does not belong is refused, and nothing is done or kept for it."""

from __future__ import annotations

import asyncio
import os

import msgspec
import pytest

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.frames import HEAD, frame
from computron.parameter_service.wire.link import connect
from computron.parameter_service.wire.machine import machine_id
from computron.parameter_service.wire.messages import (
    Commit,
    Data,
    Expect,
    Extra,
    Failed,
    Host,
    Hyperparameters,
    Join,
    Push,
    Refused,
    Write,
    decoder,
)
from tests.parameter_service.aggregator.cluster import KEY, TOKEN, FakeMaster, RawWorker, cluster, job

SPEC = job(((300,),), optimizer="sgd", extras=(TensorSpec("seen", (3,), "int64", 0),))


async def joined(master: FakeMaster, *, shared: bool) -> RawWorker:
    await master.host(SPEC, {"a": [0]})
    worker = RawWorker(master, SPEC, shared=shared)
    await worker.join({"a": [0]})
    return worker


async def answer_to(master: FakeMaster, sent: bytes) -> Refused:
    """Of an aggregator to a stranger who sends no more than this."""
    reader, writer = await asyncio.open_connection("127.0.0.1", master.addresses["a"].port)
    try:
        writer.write(sent)
        async with asyncio.timeout(10):
            _, _, _, body, _ = HEAD.unpack(await reader.readexactly(HEAD.size))
            answer = decoder(Data).decode(await reader.readexactly(body))
    finally:
        writer.close()
    assert isinstance(answer, Refused)
    return answer


async def test_nothing_is_kept_for_a_stranger() -> None:
    async with cluster("a") as master:
        await master.host(SPEC, {"a": [0]})
        refused = await answer_to(master, frame(Extra("job", 1, "v", 1, 0), payload=1 << 62))
        assert refused.message == "join first"


async def test_a_refusal_is_never_answered() -> None:
    async with cluster("a") as master:
        refused = Refused("gone", refusals.UNKNOWN_JOB, "job gone is not here")
        answer = await answer_to(master, frame(refused) + frame(Join("other", TOKEN, 0, "x", 1, False)))
        assert answer.message == "job other is not here"


async def test_what_belongs_to_a_version_has_its_size() -> None:
    async with cluster("a") as master:
        worker = await joined(master, shared=True)
        link = await worker.link("a")
        for size, tensor in ((25, 0), (0, 0), (24, 1), (24, -1)):
            link.send(Extra("job", 1, "v", 1, tensor), payload=bytes(size))
        await worker.until(lambda: len(worker.refused) == 4)
        assert [refused.message for refused in worker.refused] == [
            "25 bytes where 24 belong",
            "0 bytes where 24 belong",
            "the job has no tensor 1 that is not trained",
            "the job has no tensor -1 that is not trained",
        ]


async def test_a_gradient_or_a_state_without_its_bytes_is_none() -> None:
    async with cluster("a") as master:
        worker = await joined(master, shared=False)
        link = await worker.link("a")
        for message in (Push("job", 1, 1, 0), Push("job", 1, 1, 99), Write("job", 1, 0, "parameters", 0, True)):
            link.send(message)
        link.send(Commit("job", 1, 1, (Hyperparameters(lr=1.0),)))
        await worker.until(lambda: len(worker.refused) == 4)
        *bare, commit = worker.refused
        assert [refused.message for refused in bare] == ["Push has no payload"] * 2 + ["Write has no payload"]
        assert "were not pushed" in commit.message
        assert not worker.applied


async def test_a_staging_segment_that_can_be_cut_short_is_refused() -> None:
    async with cluster("a") as master:
        await master.host(SPEC, {"a": [0]})
        worker = RawWorker(master, SPEC)
        link = await connect(master.addresses["a"], worker, machine=machine_id())
        bare = os.memfd_create("bare")
        os.ftruncate(bare, 1 << 20)
        link.send(Join("job", TOKEN, 0, "x", 1, True), fds=[bare])
        await worker.until(lambda: bool(worker.refused))
        assert worker.refused[0].message == "a segment whose size is not sealed"
        os.close(bare)
        link.close()


@pytest.mark.parametrize("changes", [{"optimizer": "magic"}, {"block_elements": 1 << 30}])
async def test_a_job_that_cannot_be_is_not_hosted(changes: dict[str, object]) -> None:
    async with cluster("a") as master:
        await master.send("a", Host(msgspec.structs.replace(SPEC, **changes), TOKEN, 1, (0,), (0,), 0, "worker"))
        [(_, failed)] = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "host"


async def test_only_who_has_the_keys_can_announce_blocks() -> None:
    spec = job(((300,), (300,)), optimizer="sgd", block_elements=1024)
    async with cluster("a") as master:
        await master.host(spec, {"a": [0]}, epoch=3)
        worker = RawWorker(master, spec, shared=False)
        link = await connect(master.addresses["a"], worker, machine="elsewhere")
        for key, token, epoch in (("", TOKEN, 3), (KEY, "a guess", 3), (KEY, TOKEN, 1_000_000), (KEY, TOKEN, 2)):
            link.send(Expect(key, spec, token, epoch, (0,), (1,)))
        await worker.until(lambda: len(worker.refused) == 4)
        codes = [refused.code for refused in worker.refused]
        assert codes == [refusals.BAD_TOKEN, refusals.BAD_TOKEN, refusals.STALE_EPOCH, refusals.STALE_EPOCH]
        assert (await master.hold(spec, 4, "a"))["a"].epoch == 4  # it would not take an order of an older one
        link.close()
