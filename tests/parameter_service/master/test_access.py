"""Whom the master lets in, whom it does not, and when it cannot go on."""

from __future__ import annotations

from dataclasses import replace

import aiohttp
import pytest

from computron.parameter_service.master.journal import LogUnusable
from computron.parameter_service.master.key import key_path
from computron.parameter_service.master.server import MasterServer, MasterSettings
from computron.parameter_service.wire.messages import Placement, Register
from tests.parameter_service.master.fakes import KEY, FakeAgent, FakeAggregator, address_of, job_spec
from tests.parameter_service.master.test_journal import fill_up


async def test_nothing_is_told_without_the_key(settings: MasterSettings) -> None:
    async with MasterServer(replace(settings, api_key="sesame")) as server, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            await FakeAgent(server.url, key="wrong").__aenter__()
        async with session.get(f"{server.url}/v1/jobs") as answer:
            assert answer.status == 401
            assert (await answer.json())["error"]["code"] == "invalid_api_key"
        async with session.get(f"{server.url}/health") as answer:
            assert answer.status == 200
        async with FakeAgent(server.url, key="sesame") as agent, FakeAggregator(server.url, "one", key="sesame"):
            await agent.enlist(job_spec())
            assert isinstance(await agent.placed(), Placement)


async def test_a_second_master_is_told_why_it_cannot_start(server: MasterServer, settings: MasterSettings) -> None:
    with pytest.raises(LogUnusable, match="another master"):
        await MasterServer(settings).__aenter__()


async def test_what_cannot_be_understood_ends_its_link_alone(server: MasterServer) -> None:
    async with FakeAgent(server.url) as agent:
        await agent.socket.send_bytes(b"nonsense")
        assert (await agent.socket.receive()).type is aiohttp.WSMsgType.CLOSED or agent.socket.closed
    async with FakeAggregator(server.url, "one"):
        assert server.master.state.is_linked("one")


async def test_a_log_that_cannot_be_written_ends_the_master(
    settings: MasterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        MasterServer(settings) as server,
        FakeAggregator(server.url, "one") as one,
        FakeAgent(server.url) as agent,
    ):
        fill_up(monkeypatch)
        await agent.enlist(job_spec())
        with pytest.raises(LogUnusable, match="No space left on device"):
            await server.ticking
        assert one.applied == {}
        assert agent.received == []


async def test_who_does_not_know_the_key_is_no_aggregator(server: MasterServer) -> None:
    async with FakeAgent(server.url) as stranger:
        await stranger.say(Register(address_of("one"), "a guess", 1, 1 << 30, ()))
        await stranger.ended()
    assert not server.master.state.aggregators


async def test_the_name_of_an_aggregator_that_is_there_is_its_own(server: MasterServer) -> None:
    async with FakeAggregator(server.url, "one", pid=1), FakeAgent(server.url) as another:
        await another.say(Register(address_of("one"), KEY, 2, 1 << 30, ()))
        await another.ended()
        assert server.master.state.aggregators["one"].pid == 1
    async with FakeAggregator(server.url, "one", pid=2):
        assert server.master.state.aggregators["one"].pid == 2


async def test_the_key_is_made_once_and_only_its_user_may_read_it(settings: MasterSettings) -> None:
    kept = replace(settings, key=None)
    keys = []
    for _ in range(2):
        async with MasterServer(kept) as server:
            path = key_path(settings.log)
            keys.append(path.read_text())
            async with FakeAggregator(server.url, "one", service_key=keys[-1]):
                assert path.stat().st_mode & 0o777 == 0o600
    assert keys[0] == keys[1]
    assert len(keys[0]) == 64
