"""What one request, one operator or one broken node does to a group must not cost the others more than it has to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from transformers import LlamaConfig

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from tests.end_to_end.groups import Group, group_of

MIB = 1 << 20
PROMPTS = [list(range(1 + n, 9 + 2 * n)) for n in range(8)]


@pytest.fixture
def llama(tmp_path: Path) -> ModelConfig:
    folder = tmp_path / "llama"
    LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        bos_token_id=None,
        eos_token_id=None,
    ).save_pretrained(folder)
    return ModelConfig(id="a", source=f"random:{folder}", dtype="float32", max_batch_size=3, max_queue=5)


@pytest.fixture
def config(llama: ModelConfig) -> Config:
    """Besides a language model one whose second node dies of negative numbers."""
    deadly = ModelConfig(id="deadly", task="custom", factory="tests.end_to_end.split_models:make_deadly")
    return Config(
        device=DeviceConfig(kind="host", memory=5 * MIB, page_size=64 << 10),
        host=HostConfig(memory=40 * MIB),
        group=GroupConfig(2, 1, node_timeout=1.0),
        models=(llama, deadly),
    )


@contextlib.asynccontextmanager
async def restarting(group: Group, rank: int):
    """Whenever the node ends it is started again. Gives a list that grows with the times."""
    times: list[int] = []

    async def watch() -> None:
        while True:
            times.append(await group.ended(rank, timeout=600))
            group.start(rank)

    watching = asyncio.ensure_future(watch())
    try:
        yield times
    finally:
        watching.cancel()


async def test_a_request_that_kills_its_node_is_given_up_and_others_are_served(config, tmp_path):
    async with group_of(config, tmp_path) as group:
        assert (await group.post("/v1/models/deadly/infer", input=[2.0]))[1]["output"] == [2.0]
        expected = await group.tokens("a", PROMPTS[0], 8)
        async with restarting(group, 1) as deaths:
            status, body = await group.post("/v1/models/deadly/infer", input=[-1.0])
            assert status == 503
            assert "the group broke 3 times while it computed this request" in body["error"]["message"]
            await group.ready()
            assert await group.tokens("a", PROMPTS[0], 8) == expected
            assert len(deaths) == 3


async def test_requests_in_flight_are_not_turned_away_for_a_full_queue(config, tmp_path):
    async with group_of(config, tmp_path) as group:
        expected = [await group.tokens("a", prompt, 100) for prompt in PROMPTS]
        running = []
        for number, prompt in enumerate(PROMPTS):
            running.append(asyncio.ensure_future(group.tokens("a", prompt, 100)))
            async with asyncio.timeout(20):  # three run, the others wait
                while (await group.metric("computron_queue_depth"))['model="a"'] != max(0, number - 2):
                    await asyncio.sleep(0.002)
        group.kill(1)
        group.start(1)
        assert await asyncio.gather(*running) == expected


async def test_a_leader_that_is_stopped_while_it_starts_takes_its_nodes_along(config, tmp_path):
    group = Group(replace(config, group=replace(config.group, tensor_parallel=1, pipeline_parallel=3)), tmp_path)
    async with aiohttp.ClientSession() as group.session:
        try:
            group.start(0)
            group.start(1)
            async with asyncio.timeout(60):
                while "waiting for node 2" not in ((await group.state())[1] or {}).get("reason", ""):
                    await asyncio.sleep(0.02)
            group.signal(0, signal.SIGTERM)
            assert await group.ended(0) == 128 + signal.SIGTERM
            assert await group.ended(1) == 0
        finally:
            await group.stop()
