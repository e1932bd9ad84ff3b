"""What a worker brings counts once."""

from __future__ import annotations

from pathlib import Path

import torch

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.versions.files import finish
from computron.parameter_service.wire.messages import Extra, Failed, Saved, Write
from tests.parameter_service.aggregator.cluster import Reference, cluster, job
from tests.parameter_service.aggregator.test_reconfiguration import snapshot
from tests.parameter_service.aggregator.test_steps import ADAM, assert_equal, one_step, spread, started


async def test_a_write_that_comes_again_changes_nothing(tmp_path: Path) -> None:
    """Its answer was lost. The snapshot that it was written to may be finished by now."""
    spec = job(snapshot_every=4)
    reference = Reference(spec, **ADAM)
    owners = spread(reference, "a")
    async with cluster("a", folder=tmp_path) as master:
        workers = await started(master, spec, reference, (False,), owners)
        await snapshot(master, 0, len(reference.layout.blocks))
        await one_step(workers, reference, 1, ADAM)
        block = reference.layout.blocks[0]
        link = await workers[0].link("a")
        old = torch.full((block.elements,), 7.0)
        link.send(Write(spec.job, 1, block.index, "parameters", 0, True), payload=old.numpy().data)
        await workers[0].until(lambda: workers[0]._written == len(reference.layout.blocks) + 1)
        await one_step(workers, reference, 2, ADAM)
        assert_equal(workers, reference)
        assert not [message for _, message in master.told if isinstance(message, Failed)]


async def test_a_tensor_of_a_version_that_comes_again_when_that_is_complete_is_taken(tmp_path: Path) -> None:
    spec = job(extras=(TensorSpec("seen", (), "int64", 0),))
    reference = Reference(spec, **ADAM)
    async with cluster("a", folder=tmp_path) as master:
        (worker,) = workers = await started(master, spec, reference, (False,), spread(reference, "a"))
        await one_step(workers, reference, 1, ADAM, version="v1")
        link = await worker.link("a")
        for time in (1, 2):
            link.send(Extra(spec.job, 1, "v1", 1, 0), payload=bytes(8))
            await worker.until(lambda time=time: worker.taken == time)
            if time == 1:
                ((_, told), *_) = await master.heard(lambda who, m: isinstance(m, Saved) and m.extras == (0,))
                finish(Path(told.path), told.history)
        assert not [message for _, message in master.told if isinstance(message, Failed)]
