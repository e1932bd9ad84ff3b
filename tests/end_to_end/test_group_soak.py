"""Six models on a group with room for two, two hundred requests at once, clients that leave, a link that fails."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from transformers import BertConfig, LlamaConfig, OPTConfig

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig, SchedulerConfig
from tests.end_to_end.groups import Group, group_of

MIB = 1 << 20
PAGE = 64 << 10
REQUESTS = 200
FAULTS = 12
LENGTHS = (1, 9, 30, 70)
LONGEST = 24  # tokens of an answer
CLEAR_ERRORS = {"queue_full", "service_unavailable", "deadline_exceeded", "swap_failed"}
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHAPES = {
    "llama": lambda: LlamaConfig(**_SHAPE, intermediate_size=256, num_key_value_heads=2),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=256),
    "bert": lambda: BertConfig(**_SHAPE, intermediate_size=256),
}
PROMPTS = [[(7 * length + 13 * place) % 512 for place in range(length)] for length in LENGTHS]


@pytest.fixture(params=[(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def config(request, tmp_path: Path) -> Config:
    """Shards are of 1.2 MiB or less."""
    for name, shape in SHAPES.items():
        shape().save_pretrained(tmp_path / name)
    models = (
        ModelConfig(id=f"{shape}-{seed}", source=f"random:{tmp_path / shape}", dtype="float32", seed=seed,
                    task="embed" if shape == "bert" else "generate")
        for shape in SHAPES for seed in range(2)
    )  # fmt: skip
    return Config(
        device=DeviceConfig(kind="host", memory=3 * MIB, page_size=PAGE, link_bandwidth=5e8, verify=True),
        host=HostConfig(memory=24 * MIB),
        group=GroupConfig(*request.param),
        scheduler=SchedulerConfig(max_queue=60),
        models=tuple(models),
    )


async def ask(group: Group, model: str, prompt: list[int], count: int, stream: bool) -> tuple[str, list[Any]]:
    """ "ok" and what the model answers, or the code of the error and nothing."""
    if model.startswith("bert"):
        status, body = await group.post("/v1/embeddings", model=model, input=prompt)
        return ("ok", body["data"][0]["embedding"]) if status == 200 else (str(body["error"]["code"]), [])
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
    async with group.session.post(f"{group.url}/v1/completions", json={**body, "stream": stream}) as response:
        text = await response.text()
    if response.status != 200:
        return str(json.loads(text)["error"]["code"]), []
    if not stream:
        return "ok", json.loads(text)["choices"][0]["token_ids"]
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    for chunk in chunks:
        if "error" in chunk:
            return str(chunk["error"]["code"]), []
    assert text.rstrip().endswith("data: [DONE]")
    return "ok", [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


async def outcome(group: Group, expected: dict[tuple[str, int], list[Any]], rng: random.Random) -> str:
    """How one request ended; a wrong answer fails the test."""
    (model, number), right = rng.choice(list(expected.items()))
    count, stream, patience = rng.randint(1, LONGEST), rng.random() < 0.5, rng.uniform(0, 3)
    leaves = rng.random() < 0.25
    try:
        async with asyncio.timeout(patience if leaves else 100):
            code, answer = await ask(group, model, PROMPTS[number], count, stream)
    except TimeoutError:
        assert leaves, f"{model} gave no answer"
        return "left"
    if code == "ok":
        assert answer == pytest.approx(right if model.startswith("bert") else right[:count], abs=1e-4), model
    return code


async def fail_copies(group: Group) -> None:
    """On one node, until cancelled; how many of these transfers had to fail is chance."""
    for _ in range(FAULTS):
        group.signal(1, signal.SIGUSR1)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_request_survives_a_link_that_fails_on_one_node(config, tmp_path, rank):
    """Its first step begins while pages still travel, and waits on the one node for what the other does not give."""
    slow = replace(config, device=replace(config.device, link_bandwidth=4e6))
    async with group_of(slow, tmp_path) as group:
        group.signal(rank, signal.SIGUSR1)
        answer = await group.tokens("llama-0", PROMPTS[2], LONGEST)
        assert await group.tokens("llama-0", PROMPTS[2], LONGEST) == answer

        async def failed() -> list[float]:
            swaps = await group.metric("computron_swaps_total")
            return [swaps[f'node="{node}",outcome="failed"'] for node in range(2)]

        async with asyncio.timeout(20):
            while sum(await failed()) == 0:
                await asyncio.sleep(0.05)
        assert (await failed())[rank] == 1
        assert (await group.state())[0] == 200


async def test_every_request_ends_rightly_and_nothing_is_left(config, tmp_path):
    rng = random.Random(4)
    async with group_of(config, tmp_path) as group:
        expected = {}
        for model in config.models:
            for number, prompt in enumerate(PROMPTS):
                code, expected[model.id, number] = await ask(group, model.id, prompt, LONGEST, stream=False)
                assert code == "ok"
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=group.session.timeout
        ) as crowd:
            group.session, quiet = crowd, group.session
            calls = [outcome(group, expected, rng) for _ in range(REQUESTS)]
            *outcomes, _ = await asyncio.gather(*calls, fail_copies(group))
            group.session = quiet
        counted = Counter(outcomes)
        assert set(counted) <= {"ok", "left"} | CLEAR_ERRORS, counted
        assert counted["ok"] > REQUESTS / 2, counted

        async def at_rest() -> bool:
            async with group.session.get(f"{group.url}/v1/models") as response:
                models = (await response.json())["data"]
            memory = await group.metric("computron_device_memory_bytes")
            cache = [value for labels, value in memory.items() if '"cache"' in labels]
            return len(cache) == 2 and not any(cache) and not any(m["queue_depth"] or m["running"] for m in models)

        async with asyncio.timeout(20):
            while not await at_rest():
                await asyncio.sleep(0.05)
        swaps = await group.metric("computron_swaps_total")
        assert swaps['node="1",outcome="failed"'] > 0
        assert swaps['node="0",outcome="failed"'] == 0
        for (model, number), right in expected.items():
            code, answer = await ask(group, model, PROMPTS[number], LONGEST, stream=True)
            assert code == "ok"
            assert answer == pytest.approx(right, abs=1e-4), model
        memory = await group.metric("computron_device_memory_bytes")
        for rank in range(2):
            of_node = [value for labels, value in memory.items() if f'node="{rank}"' in labels]
            assert sum(of_node) == 3 * MIB
