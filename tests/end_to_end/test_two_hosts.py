"""A group over two hosts, whose network breaks and heals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import openai
import pytest
import pytest_asyncio

from tests.end_to_end.hosts import Hosts, cut, launched_on, two_hosts, why_not
from tests.end_to_end.launched import Launch, checkpoint, configuration
from tests.end_to_end.load import BROKEN, HUNG, REFUSED, RIGHT, WRONG, Clients, counted

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
    async with openai.AsyncOpenAI(base_url=f"{served.hosts.url}/v1", api_key="any") as client:
        for model in "abc":
            whole = await client.completions.create(model=model, prompt="Once", max_tokens=16, temperature=0)
            stream = await client.completions.create(
                model=model, prompt="Once", max_tokens=16, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].text async for chunk in stream]
            assert len(pieces) > 2
            assert "".join(pieces) == whole.choices[0].text
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 16


@pytest.mark.parametrize("kind", ["link down", "all lost"])
async def test_a_cut_network_heals_by_itself(served, kind):
    seen = await cut(served.hosts, served.clients, kind, SECONDS, PATIENCE)
    print(f"\n{kind}: refused after {seen.noticed:.2f} s, answers {seen.healed:.2f} s after it has healed;",
          f"{counted(seen.outcomes)}", end=" ")  # fmt: skip
    assert not served.clients.of(WRONG, HUNG, BROKEN)
    assert not [outcome for outcome in seen.during if outcome.kind == RIGHT]
    refused = [outcome for outcome in seen.during if outcome.kind == REFUSED]
    assert refused
    assert all("waiting for node 1" in outcome.detail for outcome in refused), refused
    assert [len(launch.starts(rank)) for rank, launch in enumerate(served.launches)] == [1, 1]
