"""A group over two hosts, whose network breaks and heals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.end_to_end.hosts import Hosts, cut, launched_on, two_hosts, why_not
from tests.end_to_end.launched import Launch, checkpoint, configuration
from tests.end_to_end.load import BROKEN, HUNG, REFUSED, RIGHT, WRONG, Clients, counted, official_answers

NODE_TIMEOUT = 1.0  # seconds
SECONDS = 3.0  # of a cut
PATIENCE = 60.0  # seconds for what takes a few

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True, slots=True)
class Served:
    hosts: Hosts
    launches: tuple[Launch, Launch]
    clients: Clients


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[(2, 1), (1, 2)], ids=["tensor", "pipeline"])
async def served(request, tmp_path_factory) -> AsyncIterator[Served]:
    """One node on each host, and clients who know the answers."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("hosts")
    config = configuration(
        path / "serve.toml", checkpoint(path / "llama"), *request.param, port=0, node_timeout=NODE_TIMEOUT
    )
    with two_hosts() as hosts:
        async with launched_on(hosts, config, path) as launches:
            clients = Clients(hosts.url)
            await clients.learn()
            yield Served(hosts, launches, clients)


async def test_the_official_client_is_served(served):
    assert len(set(await official_answers(served.hosts.url))) == 3


@pytest.mark.parametrize("kind", ["link down", "all lost"])
async def test_a_cut_network_heals_by_itself(served, kind):
    seen = await cut(served.hosts, served.clients, kind, SECONDS, PATIENCE)
    assert seen.noticed is not None
    print(f"\n{kind}: refused after {seen.noticed:.2f} s, answers {seen.healed:.2f} s after it has healed;",
          f"{counted(seen.outcomes)}", end=" ")  # fmt: skip
    assert not served.clients.of(WRONG, HUNG, BROKEN)
    assert not [outcome for outcome in seen.during if outcome.kind == RIGHT]
    refused = [outcome for outcome in seen.during if outcome.kind == REFUSED]
    assert refused
    assert all("waiting for node 1" in outcome.detail for outcome in refused), refused
    assert await official_answers(served.hosts.url)
    assert [len(launch.starts(rank)) for rank, launch in enumerate(served.launches)] == [1, 1]


async def test_it_is_said_when_only_a_part_of_the_network_works(served):
    hosts, clients = served.hosts, served.clients
    async with clients.asking():
        await clients.answered(0, PATIENCE, count=3)
        try:
            hosts.close_ports()
        except RuntimeError as error:
            pytest.skip(str(error))
        await clients.refused(PATIENCE, "the last attempt failed: node 1: ", "the leader's store at 10.77.0.1:")
        attempts = served.launches[0].log.count("group_not_formed")
        await asyncio.sleep(1)
        assert served.launches[0].log.count("group_not_formed") - attempts < 10
        hosts.open_ports()
        await clients.answered(time.monotonic(), PATIENCE, count=3)
    assert not clients.of(WRONG, HUNG, BROKEN)
