"""What goes into files, and what the master hears of it, whatever becomes of the job meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from computron.errors import StorageFailed
from computron.parameter_service.aggregator import saving
from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.orders import new_job
from computron.parameter_service.aggregator.saving import Save, Saver
from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.versions.files import SharedFile, partial_path
from computron.parameter_service.wire.messages import (
    NO_FOLDER,
    Drop,
    Extra,
    Failed,
    Host,
    Kept,
    MovedOut,
    Ready,
    Registered,
    Saved,
    Stop,
)
from tests.parameter_service.aggregator.cluster import NEVER, TOKEN, FakeMaster, Reference, cluster, job
from tests.parameter_service.aggregator.test_faults import HYPER, until
from tests.parameter_service.aggregator.test_reconfiguration import kept, rejoin, snapshot
from tests.parameter_service.aggregator.test_steps import ADAM, assert_equal, one_step, spread, started


async def saved(master: FakeMaster, version: str, blocks: int) -> list[Saved]:
    """What is told of a file until so many blocks are in it."""
    found: list[Saved] = []
    while len({block for message in found for block in message.blocks}) < blocks:
        entries = await master.heard(lambda who, m: isinstance(m, Saved) and m.version == version)
        found += [message for _, message in entries]
    return found


async def test_a_version_of_another_history_goes_into_another_file(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=8)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    count = len(reference.layout.blocks)
    async with cluster("a", folder=tmp_path) as master:
        (worker,) = workers = await started(master, spec, reference, (True,), owners)
        path = await snapshot(master, 0, count)
        await one_step(workers, reference, 1, ADAM, version="v1")
        assert {message.history for message in await saved(master, "v1", count)} == {1}
        await master.host(spec, owners, epoch=2, source=str(path))
        worker.applied = dict.fromkeys(range(count), 0)
        await rejoin(workers, owners, 2)
        worker.gradient.zero_()
        again = Reference(spec, **ADAM)
        again.step([[torch.zeros_like(p) for p in again.parameters]])
        await worker.commit(1, HYPER, version="v1")
        await worker.answered(1)
        final = await snapshot(master, 1, count)
        assert torch.equal(load_file(final)["t0"], again.parameters[0])
        assert partial_path(final, 1).exists()  # the master removes it
        host = Host(spec, TOKEN, 3, (0,), tuple(owners["a"]), 1, "keep", NEVER, 3)  # others went back in that epoch
        await master.send("a", host)
        await master.heard(lambda who, m: isinstance(m, Ready) and m.epoch == 3)
        await rejoin(workers, owners, 3)
        await worker.commit(2, HYPER, version="v2")
        assert {message.history for message in await saved(master, "v2", count)} == {3}


async def test_what_was_told_of_files_is_told_again_until_they_are_complete_or_void(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=2, extras=(TensorSpec("seen", (), "int64", 0),))
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    count = len(reference.layout.blocks)
    async with cluster("a", folder=tmp_path) as master:
        (worker,) = workers = await started(master, spec, reference, (True,), owners)
        path = await snapshot(master, 0, count)
        await one_step(workers, reference, 1, ADAM, version="v1")
        (await worker.link("a")).send(Extra(spec.job, 1, "v1", 1, 0), payload=bytes(8))
        await saved(master, "v1", count)
        await master.heard(lambda who, m: isinstance(m, Saved) and bool(m.extras))
        await saved(master, "", count)

        async def told_again(epoch: int) -> list[tuple[str, int, int, tuple[int, ...]]]:
            await master.send("a", Registered())
            await master.hold(spec, epoch, "a")  # answered after what is told before
            found = [m for _, m in await master.heard(lambda who, m: isinstance(m, Saved), 0)]
            return sorted((m.version, m.step, len(m.blocks), m.extras) for m in found)

        version = ("v1", 1, count, (0,))
        assert await told_again(1) == [("", 0, count, ()), ("", 1, count, ()), version]
        await master.send("a", Kept(spec.job, 1))
        assert await told_again(1) == [version]
        await master.host(spec, owners, epoch=2, source="keep", applied=1)
        assert version in await told_again(2)
        await master.host(spec, owners, epoch=3, source=str(path))
        assert await told_again(3) == []


@pytest.fixture
def may_sync(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no file is complete."""
    sync, event = SharedFile.sync, threading.Event()

    def slow(self: SharedFile) -> None:
        event.wait(10)
        sync(self)

    monkeypatch.setattr(SharedFile, "sync", slow)
    return event


async def test_who_is_to_stop_writes_and_tells_first(tmp_path: Path, may_sync: threading.Event) -> None:
    spec = job(workers=1)
    reference = Reference(spec, **ADAM)
    count = len(reference.layout.blocks)
    async with cluster("a", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        for step, version in enumerate(("v1", "v2"), 1):
            await one_step(workers, reference, step, ADAM, version=version)
        await master.send("a", Stop())
        await master.hold(msgspec.structs.replace(spec, job="another"), 1, "a")  # it has heard
        may_sync.set()
        for version in ("v1", "v2"):
            assert {m.step for m in await saved(master, version, count)} == {int(version[1])}
        await until(lambda: master._sockets["a"].closed)


async def test_snapshots_that_no_step_waits_for_do_not_pile_up(
    tmp_path: Path, may_sync: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, make = [], Save.__init__

    def noted(self: Save, *args: Any) -> None:
        saves.append(self)
        make(self, *args)

    monkeypatch.setattr(Save, "__init__", noted)
    spec = job(workers=1, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    count = len(reference.layout.blocks)
    async with cluster("a", "b", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), owners)
        for name in owners:
            await master.send(name, Kept(spec.job, None))
        for step in range(1, 11):
            await one_step(workers, reference, step, ADAM)
        await until(lambda: sum(len(save._taken) for save in saves) <= 3 * count)
        await kept(master, spec, 0)
        may_sync.set()
        await snapshot(master, 9, count)
        await kept(master, spec, 9)
        await one_step(workers, reference, 11, ADAM)
        assert_equal(workers, reference)


async def test_a_job_that_has_moved_away_leaves_what_its_version_lacks(
    tmp_path: Path, may_sync: threading.Event
) -> None:
    spec = job(((64,),), workers=1)
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        await one_step(workers, reference, 1, ADAM, version="v1")
        expected = reference.parameters[0].detach().clone()
        await master.move(spec, "a", "b", [0])
        step = 1
        while not any(isinstance(message, MovedOut) for _, message in master.told):
            step += 1  # after each, what has been copied may leave
            await one_step(workers, reference, step, ADAM)
        await master.send("a", Drop(spec.job))
        await master.hold(spec, 2, "a")  # it has heard
        may_sync.set()
        assert torch.equal(load_file(await snapshot(master, 1, 1))["t0"], expected)


async def test_of_jobs_that_are_gone_little_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LEFT", 2)
    told: list[Saved] = []
    saver = Saver(tmp_path, told.append, lambda *_: None, lambda *_: None, lambda *_: None)
    for number in range(5):
        spec = msgspec.structs.replace(job(((64,),)), job=f"job{number}")
        hosted = new_job(Host(spec, TOKEN, 1, (0,), (0,), 0, "worker"))
        saver.save(hosted, [HeldBlock.create(spec, hosted.layout.blocks[0])], 1, "v1")
        if number % 2:
            saver.left(spec.job)  # what is ordered is written
        await until(lambda number=number: len(told) == number + 1)
        saver.left(spec.job)
    told.clear()
    saver.tell_again()
    assert [message.job for message in told] == ["job3", "job4"]
    saver.close()


async def test_whether_a_snapshot_is_damaged_or_missing_or_out_of_reach_is_told_apart(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=8)
    owners = spread(Reference(spec, **ADAM), "a")
    sources = {"restore": tmp_path / "cut", "find": tmp_path / "missing", "host": tmp_path / "nowhere" / "file"}
    sources["restore"].touch()
    async with cluster("a", folder=tmp_path) as master:
        for epoch, (order, source) in enumerate(sources.items(), 1):
            await master.send("a", Host(spec, TOKEN, epoch, (0,), tuple(owners["a"]), 5, str(source), 5))
            ((_, failed),) = await master.heard(lambda who, m: isinstance(m, Failed))
            assert (failed.epoch, failed.order) == (epoch, order)


async def test_who_has_no_folder_says_so_once_until_a_limit_is_set_anew() -> None:
    spec = job(workers=1, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True,), owners)
        for step in range(1, 4):
            await one_step(workers, reference, step, ADAM)

        async def failures(epoch: int) -> list[Failed]:
            await master.hold(spec, epoch, "a")  # answered after what is told before
            return [m for _, m in await master.heard(lambda who, m: isinstance(m, Failed), 0)]

        assert [(failed.order, failed.message) for failed in await failures(2)] == [("save", NO_FOLDER)]
        await master.send("a", Host(spec, TOKEN, 3, (0,), tuple(owners["a"]), 3, "keep", 0))
        await master.heard(lambda who, m: isinstance(m, Ready) and m.epoch == 3)
        assert [failed.epoch for failed in await failures(4)] == [3]


async def test_of_snapshots_that_fail_no_more_than_one_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SharedFile) -> None:
        raise StorageFailed(f"{self.path}: the disk is full")

    spec = job(((64,),), workers=1, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    async with cluster("a", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        await snapshot(master, 0, 1)
        monkeypatch.setattr(SharedFile, "sync", full)
        for step in range(1, 5):
            await one_step(workers, reference, step, ADAM)
            await master.heard(lambda who, m: isinstance(m, Failed) and "the disk is full" in m.message)
        assert [path.name for path in tmp_path.rglob("*.partial")] == ["snapshot-4-1.safetensors.partial"]


async def test_a_version_that_is_there_is_told_with_its_name_and_step(tmp_path: Path) -> None:
    spec = job(workers=1)
    reference = Reference(spec, **ADAM)
    count = len(reference.layout.blocks)
    async with cluster("a", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), spread(reference, "a"))
        await one_step(workers, reference, 1, ADAM, version="v1")
        path = await snapshot(master, 1, count)
        await one_step(workers, reference, 2, ADAM, version="v1")
        ((_, failed), *_) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert (failed.order, failed.version, failed.step) == ("publish", "v1", 2)
        assert failed.message.count(str(path)) == 1
