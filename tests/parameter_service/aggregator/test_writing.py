"""What a worker brings counts once."""

from __future__ import annotations

from pathlib import Path

import torch

from computron.parameter_service.wire.messages import Failed, Write
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
