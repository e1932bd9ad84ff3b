"""A server is measured over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from computron.profiling.link import measure_link
from computron.profiling.measuring import Measured, measure
from computron.profiling.questions import Question
from computron.profiling.server import Answer, CannotProfile, Server
from computron.simulation.hardware import Profile, StepTime
from tests.profiling.conftest import Serving
from tests.profiling.stand_in import BANDWIDTH, FRAME, FRAMES, StandIn

CHAT = StepTime(0.01, per_prompt_token=2e-4, per_sequence=1e-3, per_context_token=3e-6, opening=4e-3)
EMBED = StepTime(0.004, per_prompt_token=1e-4, per_sequence=5e-4)
CUSTOM = StepTime(0.003, per_sequence=2e-3)


async def measured(serving: Serving, server: StandIn, key: str | None = None, **asked: object) -> Measured:
    async with serving(server) as address, Server(address, key) as client:
        return await measure(client, seconds=0.0, pause=0.0, **asked)  # type: ignore[arg-type]


async def test_profile_of_a_server_has_its_numbers(serving: Serving, tmp_path: Path) -> None:
    server = StandIn({"chat": CHAT, "embed": EMBED})
    found = await measured(serving, server)
    hardware, (chat, embed) = found.profile.hardware, found.profile.models
    assert (hardware.frame_bytes, hardware.frames, hardware.stages) == (FRAME, FRAMES, 1)
    assert hardware.link.bandwidth == pytest.approx(BANDWIDTH)
    assert hardware.link.latency == pytest.approx(0.001)
    assert astuple(chat.step) == pytest.approx(astuple(CHAT))
    assert astuple(embed.step) == pytest.approx(astuple(EMBED))
    assert (chat.continuous, embed.continuous) == (True, False)
    assert (chat.bytes, chat.segments, chat.max_batch_size) == (server.sizes["chat"], 6, 4)
    assert (chat.cache_bytes_per_token, embed.cache_bytes_per_token) == (512.0, 0.0)
    assert (chat.overlaps, embed.overlaps) == (False, True)
    assert found.profile.source["version"] == "1.2.3"
    found.profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == found.profile


async def test_custom_model_is_sent_what_it_takes(serving: Serving) -> None:
    server = StandIn({"custom": replace(CUSTOM, per_sequence=0.0)})
    found = await measured(serving, server, bodies={"custom": {"text": "hello"}})
    assert found.profile.models[0].step.seconds(1) == pytest.approx(CUSTOM.base)
    assert set(server.asked) == {'{"text": "hello"}'}


async def test_server_rests_before_each_call(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    pause, did = 0.00123, []
    sleep, ask = asyncio.sleep, Server.ask

    async def noted_sleep(seconds: float) -> None:
        did.extend(["rest"] if seconds == pause else [])
        await sleep(seconds)

    async def noted_ask(server: Server, question: Question) -> Answer:
        did.append("ask")
        return await ask(server, question)

    monkeypatch.setattr(asyncio, "sleep", noted_sleep)
    monkeypatch.setattr(Server, "ask", noted_ask)
    async with serving(StandIn({"embed": EMBED})) as address, Server(address) as client:
        found = await measure(client, seconds=0.0, pause=pause)
    steps = found.steps["embed"]
    assert did == ["ask"] * len(steps.calls) + ["rest", "ask"] * steps.made  # the first of each shape is not timed


async def test_only_the_models_asked_for_are_touched(serving: Serving) -> None:
    server = StandIn({"chat": CHAT, "embed": EMBED})
    found = await measured(serving, server, models=["embed"])
    assert [model.name for model in found.profile.models] == ["embed"]
    assert not server.counted["chat"]


async def test_key_is_sent(serving: Serving) -> None:
    found = await measured(serving, StandIn({"embed": EMBED}, key="secret"), key="secret")
    assert len(found.profile.models) == 1


async def test_missing_key_is_told(serving: Serving) -> None:
    with pytest.raises(CannotProfile, match="asks for an API key"):
        await measured(serving, StandIn({"embed": EMBED}, key="secret"))


async def test_unknown_model_is_told_with_those_that_are_there(serving: Serving) -> None:
    with pytest.raises(CannotProfile, match="no model 'nothing'; it has chat, embed"):
        await measured(serving, StandIn({"chat": CHAT, "embed": EMBED}), models=["nothing"])


async def test_custom_model_without_a_body_is_told(serving: Serving) -> None:
    with pytest.raises(CannotProfile, match=r"--body custom=FILE\.json"):
        await measured(serving, StandIn({"custom": CUSTOM}))


@pytest.mark.parametrize("why", ["pinned", "without weights"])
async def test_link_that_nothing_can_be_loaded_over_is_told(why: str, serving: Serving) -> None:
    server = StandIn({"embed": EMBED})
    server.pinned = why == "pinned"
    if why == "without weights":
        server.sizes["embed"] = 0
    with pytest.raises(CannotProfile, match="the link cannot be measured"):
        await measured(serving, server)


async def test_busy_server_is_not_measured(serving: Serving) -> None:
    server = StandIn({"embed": EMBED})
    server.queue_depth = 3
    with pytest.raises(CannotProfile, match="others are using embed"):
        await measured(serving, server)
    assert not server.counted["embed"]


async def test_requests_of_others_in_between_are_noticed(serving: Serving) -> None:
    server = StandIn({"chat": CHAT})
    server.tamper = 1
    with pytest.raises(CannotProfile, match="other requests to chat came between"):
        await measured(serving, server)


async def test_requests_to_other_models_are_noticed(serving: Serving) -> None:
    server = StandIn({"chat": CHAT, "embed": EMBED})
    server.beside = "embed"
    with pytest.raises(CannotProfile, match="requests to embed came while chat was measured"):
        await measured(serving, server, models=["chat"])


async def test_requests_to_other_models_are_noticed_while_the_link_is_measured(serving: Serving) -> None:
    server = StandIn({"chat": CHAT, "embed": EMBED})
    server.beside = "embed"
    async with serving(server) as address, Server(address) as client:
        (details,) = [model for model in await client.models() if model.id == "chat"]
        with pytest.raises(CannotProfile, match="requests to embed came while chat was measured"):
            await measure_link(client, [details])


async def test_no_server_is_told() -> None:
    async with Server("127.0.0.1:9") as client:
        with pytest.raises(CannotProfile, match=r"no server at http://127\.0\.0\.1:9"):
            await measure(client, seconds=0.0, pause=0.0)
