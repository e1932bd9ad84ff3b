"""Nodes die, hang and come back; whoever asked gets the right answer or a clear refusal, and nobody hangs."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from transformers import LlamaConfig

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from tests.end_to_end.groups import Group, group_of

MIB = 1 << 20
PROMPTS = [list(range(1 + n, 9 + 3 * n)) for n in range(4)]
LONG = 60  # tokens
TIMEOUT = 1.0  # group.node_timeout, seconds


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three random models on two nodes that hold two of them."""
    folder = tmp_path / "llama"
    LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    ).save_pretrained(folder)
    models = tuple(
        ModelConfig(id=name, source=f"random:{folder}", dtype="float32", seed=seed) for seed, name in enumerate("abc")
    )
    return Config(
        device=DeviceConfig(kind="host", memory=5 * MIB, page_size=64 << 10),
        host=HostConfig(memory=40 * MIB),
        group=GroupConfig(2, 1, node_timeout=TIMEOUT, recovery_timeout=60.0),
        models=models,
    )


@pytest.fixture(params=[(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def split(request, config) -> Config:
    tensor, pipeline = request.param
    return replace(config, group=replace(config.group, tensor_parallel=tensor, pipeline_parallel=pipeline))


async def answers(group: Group) -> list[list[int]]:
    """Of all models to all prompts, at once. Those that come while the group is broken come again."""

    async def answer(model: str, prompt: list[int]) -> list[int]:
        body = {"model": model, "prompt": prompt, "max_tokens": LONG, "temperature": 0, "return_token_ids": True}
        while True:
            status, given = await group.post("/v1/completions", **body)
            if status != 503:
                return given["choices"][0]["token_ids"]
            await asyncio.sleep(0.05)

    return await asyncio.gather(*(answer(model, prompt) for model in "abc" for prompt in PROMPTS))


async def streamed(group: Group, model: str, started: asyncio.Event) -> list[int]:
    """The tokens of a stream; `started` is set with the first."""
    body = {"model": model, "prompt": PROMPTS[0], "max_tokens": LONG, "temperature": 0, "stream": True,
            "return_token_ids": True}  # fmt: skip
    tokens: list[int] = []
    async with group.session.post(f"{group.url}/v1/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            tokens += chunk["choices"][0]["token_ids"]
            started.set()
    return tokens


async def test_requests_go_on_where_they_were_after_a_node_was_killed(split, tmp_path):
    async with group_of(split, tmp_path) as group:
        expected = await answers(group)
        started = asyncio.Event()
        stream = asyncio.ensure_future(streamed(group, "a", started))
        others = asyncio.ensure_future(answers(group))
        await started.wait()
        group.kill(1)
        await asyncio.sleep(0.1)
        status, body = await group.post("/v1/completions", model="a", prompt=PROMPTS[0])
        assert status == 503, body
        assert "node 1" in body["error"]["message"]
        group.start(1)
        assert await stream == expected[0]
        assert await others == expected
        assert await answers(group) == expected


async def test_a_stopped_node_is_noticed_and_let_in_again(split, tmp_path):
    async with group_of(split, tmp_path) as group:
        expected = await answers(group)
        running = asyncio.ensure_future(answers(group))
        await asyncio.sleep(0.05)
        group.signal(1, signal.SIGSTOP)
        async with asyncio.timeout(20):
            while (await group.state())[0] == 200:
                await asyncio.sleep(0.05)
        assert "waiting for node 1" in (await group.state())[1]["reason"]
        group.signal(1, signal.SIGCONT)
        assert await running == expected


async def test_a_dead_leader_finds_its_nodes_waiting(split, tmp_path):
    async with group_of(split, tmp_path) as group:
        expected = await answers(group)
        follower = group.pid(1)
        running = asyncio.gather(answers(group), return_exceptions=True)
        await asyncio.sleep(0.05)
        group.kill(0)
        (result,) = await running
        assert isinstance(result, aiohttp.ClientError)
        group.start(0)
        await group.ready()
        assert await answers(group) == expected
        assert group.pid(1) == follower


async def test_requests_are_refused_when_a_node_does_not_come_back(config, tmp_path):
    impatient = replace(config, group=replace(config.group, recovery_timeout=1.0))
    async with group_of(impatient, tmp_path) as group:
        bodies = [{"model": model, "prompt": PROMPTS[0], "max_tokens": LONG} for model in "abc"]
        running = [asyncio.ensure_future(group.post("/v1/completions", **body)) for body in bodies]
        await asyncio.sleep(0.02)
        group.kill(1)
        results = await asyncio.gather(*running)
        assert any(status == 503 for status, _ in results)
        for status, body in results:
            assert status == 200 or "waiting for node 1" in body["error"]["message"]
        async with group.session.post(f"{group.url}/v1/completions", json=bodies[0]) as response:
            assert response.status == 503
            assert float(response.headers["Retry-After"]) > 0
        metrics = await (await group.session.get(f"{group.url}/metrics")).text()
        assert "computron_nodes_missing 1.0" in metrics
        group.start(1)
        await group.ready()
        assert (await group.post("/v1/completions", **bodies[0]))[0] == 200


async def test_a_node_that_cannot_load_its_shard_ends_the_start_with_its_reason(config, tmp_path):
    group = Group(config, tmp_path)
    missing = replace(config.models[0], source=f"random:{tmp_path / 'nothing'}")
    async with aiohttp.ClientSession() as group.session:
        try:
            group.start(0)
            group.start(1, replace(config, models=(missing, *config.models[1:])))
            assert await group.ended(1) == 3
            assert await group.ended(0) == 3
            assert "node 1 cannot start" in group.log(0)
        finally:
            await group.stop()


async def test_a_node_that_cannot_load_its_shard_any_more_is_waited_for(config, tmp_path):
    async with group_of(config, tmp_path) as group:
        expected = await answers(group)
        group.kill(1)
        missing = replace(config.models[0], source=f"random:{tmp_path / 'nothing'}")
        group.start(1, replace(config, models=(missing, *config.models[1:])))
        await group.ended(1)
        assert "node 1 could not start" in (await group.state())[1]["reason"]
        group.start(1)
        await group.ready()
        assert await answers(group) == expected


async def test_a_node_that_comes_back_with_other_weights_is_not_let_in(config, tmp_path):
    async with group_of(config, tmp_path) as group:
        expected = await answers(group)
        group.kill(1)
        other = replace(config.models[0], source=config.models[0].source.replace("llama", "other"))
        LlamaConfig.from_pretrained(tmp_path / "llama", initializer_range=0.5).save_pretrained(tmp_path / "other")
        group.start(1, replace(config, models=(other, *config.models[1:])))
        await group.ended(1)
        assert "its source on node 1 is not the one" in group.log(1)
        assert "its source on node 1 is not the one" in (await group.state())[1]["reason"]
        group.start(1)
        await group.ready()
        assert await answers(group) == expected


async def test_a_group_that_is_never_complete_says_so_and_refuses(config, tmp_path):
    group = Group(config, tmp_path)
    async with aiohttp.ClientSession() as group.session:
        try:
            group.start(0)
            async with asyncio.timeout(60):
                while "waiting for node 1" not in ((await group.state())[1] or {}).get("reason", ""):
                    await asyncio.sleep(0.05)
            status, body = await group.post("/v1/completions", model="a", prompt=[1])
            assert status == 503
            assert "waiting for node 1" in body["error"]["message"]
            group.start(1)
            await group.ready()
            assert (await group.post("/v1/completions", model="a", prompt=[1]))[0] == 200
        finally:
            await group.stop()


async def test_a_node_with_another_configuration_is_refused(config, tmp_path):
    group = Group(config, tmp_path)
    async with aiohttp.ClientSession() as group.session:
        try:
            group.start(0)
            group.start(1, replace(config, models=config.models[:2]))
            assert await group.ended(1) == 3
            assert "models is a, b there and a, b, c here" in group.log(1)
        finally:
            await group.stop()
