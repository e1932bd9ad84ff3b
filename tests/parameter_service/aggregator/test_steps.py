"""What workers commit is applied: bit for bit what torch's own optimizer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from computron.parameter_service.aggregator.kernels import DTYPES
from computron.parameter_service.wire.messages import AskNorms, Hyperparameters, JobSpec
from tests.parameter_service.aggregator.cluster import FakeMaster, RawWorker, Reference, cluster, job

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}


async def started(
    master: FakeMaster, spec: JobSpec, reference: Reference, kinds: tuple[bool, ...], owners: dict[str, list[int]]
) -> list[RawWorker]:
    """Workers that have joined. kinds: which of them share memory."""
    members = range(len(kinds))
    await master.host(spec, owners, members=members)
    workers = [RawWorker(master, spec, rank, shared=shared) for rank, shared in enumerate(kinds)]
    for worker in workers:
        await worker.join(owners)
    await workers[0].initialise(reference.flat())
    return workers


def spread(reference: Reference, *names: str) -> dict[str, list[int]]:
    """Blocks dealt out in turn."""
    indices = [block.index for block in reference.layout.blocks]
    return {name: indices[place :: len(names)] for place, name in enumerate(names)}


async def one_step(
    workers: list[RawWorker], reference: Reference, step: int, settings: dict[str, Any], **more: Any
) -> None:
    gradients: list[list[Tensor]] = []
    for worker in workers:
        dtype = DTYPES[worker.spec.gradients]
        mine = [gradient.to(dtype) for gradient in reference.gradients()]
        gradients.append(mine)
        worker.gradient.copy_(reference.flat(mine))
    for worker in workers:
        await worker.commit(step, Hyperparameters(**settings), **more)
    for worker in workers:
        await worker.answered(step)
    reference.step(gradients, workers[0].spec.average)


def assert_equal(workers: list[RawWorker], reference: Reference) -> None:
    for worker in workers:
        assert not worker.refused
        assert torch.equal(worker.parameters, reference.flat())


@pytest.mark.parametrize("kinds", [(True,), (False,), (True, False), (False, True, True)], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "settings", "more"),
    [
        ("sgd", SGD, {"momentum": True}),
        ("sgd", {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "maximize": True}, {"momentum": True}),
        ("sgd", {"lr": 0.1, "weight_decay": 0.1}, {}),
        ("adam", ADAM, {}),
        ("adamw", ADAM, {}),
        ("adamw", ADAM, {"amsgrad": True}),
    ],
)
async def test_steps_are_those_of_torch(kinds, optimizer, settings, more) -> None:
    spec = job(optimizer=optimizer, workers=len(kinds), **more)
    amsgrad = {"amsgrad": True} if spec.amsgrad else {}
    reference = Reference(spec, **settings, **amsgrad)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, kinds, spread(reference, "a", "b"))
        for step in range(1, 5):
            await one_step(workers, reference, step, settings)
            assert_equal(workers, reference)
        if optimizer == "adamw":
            state = [reference.optimizer.state[p]["exp_avg_sq"] for p in reference.parameters]
            assert torch.equal(await workers[0].read("exp_avg_sq"), reference.flat(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("average", [True, False])
async def test_gradients_may_travel_in_half_precision(dtype, average) -> None:
    spec = job(gradients=dtype, average=average)
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True, False), spread(reference, "a"))
        for step in (1, 2, 3):
            await one_step(workers, reference, step, ADAM)
            assert_equal(workers, reference)


async def test_a_repeated_commit_changes_nothing_and_is_answered_again() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True, False), spread(reference, "a"))
        await one_step(workers, reference, 1, ADAM)
        for worker in workers:
            worker.applied.clear()
            worker.parameters.zero_()
            await worker.commit_at("a", 1, Hyperparameters(**ADAM))
            await worker.answered(1)
        assert_equal(workers, reference)
        await one_step(workers, reference, 2, ADAM)
        assert_equal(workers, reference)


async def test_blocks_may_be_committed_one_by_one() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True, True), spread(reference, "a"))
        gradients = [reference.gradients(), reference.gradients()]
        for worker, mine in zip(workers, gradients, strict=True):
            worker.gradient.copy_(reference.flat(mine))
        last = len(reference.layout.blocks) - 1
        for index in reversed(range(last + 1)):
            await workers[0].commit_at("a", 1, Hyperparameters(**ADAM), blocks=(index,))
        await workers[1].commit_at("a", 1, Hyperparameters(**ADAM), blocks=(last,))
        await workers[0].until(lambda: workers[0].applied == {last: 1})
        await workers[1].commit_at("a", 1, Hyperparameters(**ADAM))
        for worker in workers:
            await worker.answered(1)
        reference.step(gradients)
        assert_equal(workers, reference)


async def test_a_skipped_step_changes_nothing_and_does_not_count() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (True, False), spread(reference, "a"))
        before = workers[0].parameters.clone()
        await workers[0].commit(1, Hyperparameters(**ADAM), skip=True)
        await workers[1].commit(1, Hyperparameters(**ADAM))
        for worker in workers:
            await worker.answered(1)
            assert worker.skipped
            assert torch.equal(worker.parameters, before)
        await one_step(workers, reference, 2, ADAM)
        assert not workers[0].skipped
        assert_equal(workers, reference)


async def test_norms_are_of_what_will_be_applied() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a", "b") as master:
        workers = await started(master, spec, reference, (True, False), spread(reference, "a", "b"))
        gradients = [reference.gradients(), reference.gradients()]
        for worker, mine in zip(workers, gradients, strict=True):
            worker.gradient.copy_(reference.flat(mine))
            await worker.push(1)
            for who in ("a", "b"):
                (await worker.link(who)).send(AskNorms(spec.job, 1, 1, scale=0.5))
        for worker in workers:
            await worker.until(lambda worker=worker: len(worker.norms) == len(reference.layout.blocks))
        summed = [(a + b) / 4 for a, b in zip(*gradients, strict=True)]
        expected = torch.linalg.vector_norm(torch.cat([part.flatten() for part in summed]), dtype=torch.float64)
        assert sum(workers[0].norms.values()) ** 0.5 == pytest.approx(float(expected), rel=1e-6)
        assert workers[0].norms == workers[1].norms


async def test_a_commit_before_its_gradients_is_refused() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        workers = await started(master, spec, reference, (False,), spread(reference, "a"))
        await workers[0].commit_at("a", 1, Hyperparameters(**ADAM))
        await workers[0].until(lambda: bool(workers[0].refused))
        refused = workers[0].refused.pop()
        assert "were not pushed" in refused.message
        assert (refused.code, refused.blocks) == ("not_owner", tuple(range(len(reference.layout.blocks))))
        await one_step(workers, reference, 1, ADAM)
        assert_equal(workers, reference)


async def test_who_has_an_older_epoch_or_another_token_is_refused() -> None:
    spec = job()
    reference = Reference(spec, **ADAM)
    async with cluster("a") as master:
        owners = spread(reference, "a")
        workers = await started(master, spec, reference, (True,), owners)
        stranger = RawWorker(master, spec)
        await stranger.join(owners, token="guessed")
        await stranger.until(lambda: bool(stranger.refused))
        assert stranger.refused.pop().code == "bad_token"
        await stranger.commit_at("a", 1, Hyperparameters(**ADAM))
        await stranger.until(lambda: bool(stranger.refused))
        assert stranger.refused.pop().message == "join first"
        workers[0].epoch = 0
        await workers[0].commit_at("a", 1, Hyperparameters(**ADAM))
        await workers[0].until(lambda: bool(workers[0].refused))
        assert workers[0].refused.pop().code == "stale_epoch"
        workers[0].epoch = 1
        await one_step(workers, reference, 1, ADAM)
        assert_equal(workers, reference)
