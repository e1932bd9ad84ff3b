"""Members die, jobs roll back, masters change their minds: what the master's orders do."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.versions.files import finish
from computron.parameter_service.wire.messages import (
    Extra,
    Failed,
    Host,
    Hyperparameters,
    JobSpec,
    Keep,
    Kept,
    Register,
    Saved,
    WorkerLost,
)
from tests.parameter_service.aggregator.cluster import NEVER, TOKEN, FakeMaster, RawWorker, Reference, cluster, job
from tests.parameter_service.aggregator.test_steps import ADAM, assert_equal, one_step, spread, started

HYPER = Hyperparameters(**ADAM)


async def rejoin(workers: list[RawWorker], owners: dict[str, list[int]], epoch: int) -> None:
    for worker in workers:
        worker.epoch = epoch
        await worker.join(owners)


async def test_who_dies_before_it_has_committed_anywhere_is_left_out() -> None:
    spec = job(workers=3)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True, True, False), owners)
        await one_step(workers, reference, 1, ADAM)
        gradients = [reference.gradients() for _ in workers]
        for worker, mine in zip(workers, gradients, strict=True):
            worker.gradient.copy_(reference.flat(mine))
        await workers[0].commit(2, HYPER)
        await workers[2].push(2)
        workers[2].kill()
        lost = await master.heard(lambda who, m: isinstance(m, WorkerLost), 2)
        assert {m.rank for _, m in lost} == {2}
        held = await master.hold(spec, 2, "a", "b")
        assert all(block.applied == 1 for one in held.values() for block in one.blocks)
        await master.host(spec, owners, epoch=2, source="keep", members=(0, 1), applied=1)
        await rejoin(workers[:2], owners, 2)
        for worker in workers[:2]:
            await worker.commit(2, HYPER)
        for worker in workers[:2]:
            await worker.answered(2)
        reference.step(gradients[:2])
        assert_equal(workers[:2], reference)


async def test_a_step_that_some_blocks_have_seen_is_completed_with_the_gradients_of_the_dead() -> None:
    spec = job(workers=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True, False), owners)
        gradients = [reference.gradients() for _ in workers]
        for worker, mine in zip(workers, gradients, strict=True):
            worker.gradient.copy_(reference.flat(mine))
            await worker.push(1)
        for worker in workers:
            await worker.commit_at("a", 1, HYPER)
        await workers[0].until(lambda: len(workers[0].applied) == len(owners["a"]))
        workers[1].kill()
        held = await master.hold(spec, 2, "a", "b")
        assert {block.applied for block in held["a"].blocks} == {1}
        assert {block.applied for block in held["b"].blocks} == {0}
        await master.complete(spec, 2, "b", 1, owners["b"], held["a"].commits)
        await master.host(spec, owners, epoch=2, source="keep", members=(0,), applied=1)
        await rejoin(workers[:1], owners, 2)
        await workers[0].commit(1, HYPER)
        await workers[0].answered(1)
        reference.step(gradients)
        assert_equal(workers[:1], reference)


async def snapshot(master: FakeMaster, step: int, blocks: int) -> Path:
    """The finished file of a step's snapshot, when all blocks are in it."""
    saved: dict[int, tuple[str, int]] = {}
    while len(saved) < blocks:
        for _, message in await master.heard(lambda who, m: isinstance(m, Saved) and m.step == step):
            saved.update(dict.fromkeys(message.blocks, (message.path, message.history)))
    ((path, history),) = set(saved.values())
    finish(Path(path), history)
    return Path(path)


async def test_a_job_goes_back_to_its_snapshot_and_on_from_there(tmp_path: Path) -> None:
    spec = job(workers=2, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    blocks = len(reference.layout.blocks)
    async with cluster("a", "b", "c", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True, False), owners)
        assert torch.equal(load_file(await snapshot(master, 0, blocks))["t0"], reference.parameters[0])
        await one_step(workers, reference, 1, ADAM)
        await one_step(workers, reference, 2, ADAM)
        path = await snapshot(master, 2, blocks)
        kept = {name: value.clone() for name, value in load_file(path).items()}
        for number, parameter in enumerate(reference.parameters):
            assert torch.equal(kept[f"t{number}"], parameter)
            assert torch.equal(kept[f"t{number}.exp_avg"], reference.optimizer.state[parameter]["exp_avg"])
        state, saved = reference.optimizer.state_dict(), [p.detach().clone() for p in reference.parameters]
        exp = {key: {name: value.clone() for name, value in entry.items()} for key, entry in state["state"].items()}
        await one_step(workers, reference, 3, ADAM)
        await master.hold(spec, 2, "a")
        new = {"a": owners["a"], "c": owners["b"]}
        for who, indices in new.items():
            await master.send(who, Host(spec, TOKEN, 2, (0, 1), tuple(indices), 2, str(path), NEVER))
        await master.heard(lambda who, m: type(m).__name__ == "Ready" and m.epoch == 2 and bool(m.blocks), 2)
        with torch.no_grad():
            for parameter, value in zip(reference.parameters, saved, strict=True):
                parameter.copy_(value)
        reference.optimizer.load_state_dict({"state": exp, "param_groups": state["param_groups"]})
        for worker in workers:
            worker.applied = dict.fromkeys(range(blocks), 2)
        await rejoin(workers, new, 2)
        await one_step(workers, reference, 3, ADAM)
        assert_equal(workers, reference)
        await one_step(workers, reference, 4, ADAM)
        assert_equal(workers, reference)


async def test_no_step_is_applied_that_a_failure_could_take_back_with_too_many(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    blocks = len(reference.layout.blocks)
    async with cluster("a", "b", folder=tmp_path) as master:
        await master.host(spec, owners, kept=-2)
        worker = RawWorker(master, spec)
        await worker.join(owners)
        await worker.initialise(reference.flat())
        await snapshot(master, 0, blocks)
        gradients = [reference.gradients()]
        worker.gradient.copy_(reference.flat(gradients[0]))
        await worker.commit(1, HYPER)
        await worker.read("exp_avg")  # the commit has been taken
        assert not worker.applied
        await kept(master, spec, 0)
        await worker.answered(1)
        reference.step(gradients)
        await one_step([worker], reference, 2, ADAM)
        await snapshot(master, 2, blocks)
        await worker.commit(3, HYPER)
        await worker.read("exp_avg")
        assert set(worker.applied.values()) == {2}
        await kept(master, spec, 2)
        await worker.answered(3)


async def test_a_version_that_cannot_be_written_lets_no_more_steps_be_lost(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=2, extras=(TensorSpec("seen", (), "int64", 0),))
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "taken.safetensors").touch()
    async with cluster("a", folder=tmp_path) as master:
        await master.host(spec, owners, kept=0)
        worker = RawWorker(master, spec)
        await worker.join(owners)
        await worker.initialise(reference.flat())
        await one_step([worker], reference, 1, ADAM, version="taken")
        (await worker.link("a")).send(Extra(spec.job, 1, "taken", 1, 0), payload=bytes(8))
        ((_, failed), *_) = await master.heard(lambda who, m: isinstance(m, Failed))
        assert failed.order == "publish"
        await one_step([worker], reference, 2, ADAM)
        await worker.commit(3, HYPER)
        await worker.read("exp_avg")  # the commit has been taken
        assert set(worker.applied.values()) == {2}


async def test_what_a_new_epoch_leaves_unsaved_is_saved_again(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=8)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    async with cluster("a", "b", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), owners)
        await one_step(workers, reference, 1, ADAM)
        await master.hold(spec, 2, "a", "b")
        await master.host(spec, owners, epoch=2, source="keep", applied=1, kept=0)
        path = await snapshot(master, 1, len(reference.layout.blocks))
        assert path.name == "snapshot-1-2.safetensors"
        assert torch.equal(load_file(path)["t0"], reference.parameters[0])


async def test_a_job_that_nobody_works_on_is_saved_as_it_is(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=8)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    async with cluster("a", "b", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True,), owners)
        await one_step(workers, reference, 1, ADAM)
        workers[0].kill()
        for name in owners:
            await master.send(name, Keep(spec.job, 0))  # of an older epoch
            await master.send(name, Keep(spec.job, 1))
        path = await snapshot(master, 1, len(reference.layout.blocks))
        assert torch.equal(load_file(path)["t0"], reference.parameters[0])


async def test_blocks_that_have_no_state_yet_are_told() -> None:
    spec = job(workers=1)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a") as master:
        await master.host(spec, owners)
        held = await master.hold(spec, 2, "a")
        assert (held["a"].blocks, held["a"].empty) == ((), tuple(owners["a"]))
        await master.host(spec, owners, epoch=3)
        worker = RawWorker(master, spec)
        await rejoin([worker], owners, 3)
        await worker.initialise(reference.flat())
        held = await master.hold(spec, 4, "a")
        assert (len(held["a"].blocks), held["a"].empty) == (len(owners["a"]), ())


async def test_where_nothing_can_be_saved_steps_go_on_also_after_a_move() -> None:
    spec = job(workers=1, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a", "b") as master:
        await master.host(spec, owners, kept=-2)
        worker = RawWorker(master, spec)
        await worker.join(owners)
        await worker.initialise(reference.flat())
        await master.heard(lambda who, m: isinstance(m, Failed) and m.order == "save")
        for step in (1, 2, 3):
            await one_step([worker], reference, step, ADAM)
        await master.move(spec, "a", "b", [0])
        await master.moved(1)
        for step in (4, 5, 6, 7):
            await one_step([worker], reference, step, ADAM)
        assert_equal([worker], reference)


async def test_a_snapshot_that_others_could_not_write_is_waited_for_no_longer(tmp_path: Path) -> None:
    spec = job(workers=1, snapshot_every=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    async with cluster("a", folder=tmp_path) as master, cluster("b") as other:
        master.addresses["b"] = other.addresses["b"]
        await master.host(spec, {"a": owners["a"]}, kept=-2)
        await other.host(spec, {"b": owners["b"]}, kept=-2)
        worker = RawWorker(master, spec)
        await worker.join(owners)
        await worker.initialise(reference.flat())
        ((_, failed), *_) = await other.heard(lambda who, m: isinstance(m, Failed))
        assert (failed.order, failed.step) == ("save", 0)
        await master.send("a", Kept(spec.job, None))
        await one_step([worker], reference, 1, ADAM)
        await one_step([worker], reference, 2, ADAM)
        await kept(master, spec, 0, "a")
        await master.move(spec, "a", "b", [0], epoch=9)
        await master.heard(lambda who, m: isinstance(m, Failed) and m.order == "move")  # it knows what came before
        await worker.commit(3, HYPER)
        await worker.until(lambda: all(worker.applied[index] == 3 for index in owners["b"]))
        await worker.read("exp_avg")
        assert {worker.applied[index] for index in owners["a"]} == {2}


async def kept(master: FakeMaster, spec: JobSpec, step: int, *whom: str) -> None:
    for name in whom or master.addresses:
        await master.send(name, Kept(spec.job, step))


async def test_a_version_is_what_the_parameters_were_at_its_step(tmp_path: Path) -> None:
    spec = job(workers=2)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a", "b")
    async with cluster("a", "b", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (True, False), owners)
        await one_step(workers, reference, 1, ADAM, version="first")
        expected = [p.detach().clone() for p in reference.parameters]
        for step in (2, 3, 4):
            await one_step(workers, reference, step, ADAM)
        path = await snapshot(master, 1, len(reference.layout.blocks))
        assert path == tmp_path / "job" / "first.safetensors"
        found = load_file(path)
        assert all(torch.equal(found[f"t{number}"], value) for number, value in enumerate(expected))


async def test_a_job_that_waits_for_the_masters_order_is_registered_so() -> None:
    spec, owners = job(((4,),)), {"a": [0]}
    async with cluster("a") as master:
        await master.host(spec, owners)
        assert (await master.hold(spec, 2, "a"))["a"].history == 1
        for held in (True, False):
            await master.cut("a")
            ((_, registered),) = await master.heard(lambda who, m: isinstance(m, Register))
            assert [hosted.held for hosted in registered.jobs] == [held]
            await master.host(spec, owners, epoch=2)
