"""Where a job's blocks go."""

from __future__ import annotations

import msgspec
import pytest

from computron.parameter_service.layout import Layout
from computron.parameter_service.master.events import Received
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.scaling import ScalingSettings
from computron.parameter_service.packing import PACKERS
from computron.parameter_service.specs import block_bytes
from computron.parameter_service.wire.messages import Register
from tests.parameter_service.master.fakes import address_of, enlist, job_spec


@pytest.mark.parametrize(("machine", "owners"), [("here", 1), ("here by TCP", 2), ("elsewhere", 2)])
def test_gradients_that_workers_push_need_room_where_the_blocks_are(machine: str, owners: int) -> None:
    master = Master(Book(), PACKERS["utilisation"](), ScalingSettings(maximum=2), 0.0)
    spec = job_spec(blocks=4, loss_limit=1.0)
    states = sum(block_bytes(spec, block) for block in Layout(spec.tensors, spec.block_elements).blocks)
    for link, name in enumerate(("one", "two")):
        master.handle(Received(link, Register(address_of(name), "", link, states, ())), 0.0)
    master.handle(Received(9, msgspec.structs.replace(enlist(spec), machine=machine)), 0.0)
    assert len(set(master.state.jobs["lm"].book.owners)) == owners
