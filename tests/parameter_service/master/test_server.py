"""The master's process, over real websockets, with aggregators and agents that only speak."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from computron.parameter_service.master.server import MasterServer, MasterSettings
from computron.parameter_service.wire.messages import Host
from tests.parameter_service.master.fakes import FakeAgent, FakeAggregator, job_spec


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[MasterServer]:
    async with MasterServer(MasterSettings(log=tmp_path / "log", port=0)) as server:
        yield server


async def test_a_job_with_one_worker_gets_its_place(server: MasterServer) -> None:
    async with FakeAggregator(server.url, "one") as aggregator, FakeAgent(server.url) as agent:
        await agent.enlist(job_spec())
        placement = await agent.placed()
        assert (placement.epoch, placement.rank, placement.members) == (1, 0, (0,))
        assert [placement.addresses[place].aggregator for place in placement.owners] == ["one"] * 4
        assert placement.initialise
        host = await aggregator.heard(Host)
        assert (host.blocks, host.source, host.applied) == ((0, 1, 2, 3), "worker", 0)
