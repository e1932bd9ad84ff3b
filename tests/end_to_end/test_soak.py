"""Twelve models, room for three, five hundred concurrent requests of all kinds, clients that leave at random."""

from __future__ import annotations

import asyncio
import gc
import random
import re
from collections import Counter
from typing import Any

import aiohttp
import psutil

from computron.config import Config, DeviceConfig, HostConfig, ModelConfig, SchedulerConfig, ServerConfig

MIB = 1 << 20
ROUNDS = (500, 200, 200)  # requests at once; what the later rounds add would be a leak
PAGE = 64 << 10
CLEAR_ERRORS = {"queue_full", "service_unavailable", "deadline_exceeded", "swap_failed"}


def twelve_models(random_model: Any) -> tuple[ModelConfig, ...]:
    generate = [
        random_model(f"{shape}-{seed}", shape, seed=seed, max_batch_size=8)
        for shape, seeds in (("llama", (0, 1, 2)), ("opt", (0, 1)), ("gpt2", (0, 1)))
        for seed in seeds
    ]
    embed = [random_model(f"bert-{seed}", "bert", task="embed", seed=seed) for seed in (0, 1, 2)]
    custom = [
        ModelConfig(id="mlp", task="custom", factory="examples.mlp:make", arguments={"sizes": [64, 256, 8]}),
        ModelConfig(id="echo", task="custom", factory="examples.echo:make", batch_manager="examples.echo:EchoBatches"),
    ]
    return (*generate, *embed, *custom)


def body_for(model: ModelConfig, rng: random.Random) -> tuple[str, dict[str, Any]]:
    match model.task:
        case "generate":
            prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, 60))]
            sampling = rng.choice([{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"top_k": 5}])
            body = {"model": model.id, "prompt": prompt, "max_tokens": rng.randint(1, 24), "ignore_eos": True}
            return "/v1/completions", {**body, **sampling, "stream": rng.random() < 0.5}
        case "embed":
            return "/v1/embeddings", {"model": model.id, "input": "x" * rng.randint(1, 100)}
        case _:
            payload = {"input": [0.5] * 64} if model.id == "mlp" else {"number": rng.random()}
            return f"/v1/models/{model.id}/infer", payload


async def ask(session: aiohttp.ClientSession, path: str, body: dict[str, Any], patience: float | None) -> str:
    """How the request ended: "ok", "left", or the code of the error that the server gave."""
    try:
        async with asyncio.timeout(patience), session.post(path, json=body) as response:
            text = await response.text()
            if response.status != 200:
                return str((await response.json())["error"]["code"])
            if body.get("stream"):
                assert text.rstrip().endswith("data: [DONE]"), text[-200:]
            return "ok"
    except TimeoutError:
        return "left"


async def metric(session: aiohttp.ClientSession, name: str) -> dict[str, float]:
    async with session.get("/metrics") as response:
        text = await response.text()
    return {m[1]: float(m[2]) for m in re.finditer(rf"^{name}\{{(.*?)\}} (\S+)$", text, re.MULTILINE)}


async def watch_budgets(session: aiohttp.ClientSession, config: Config, stop: asyncio.Event) -> int:
    scrapes = 0
    assert config.device.memory is not None
    assert config.host.memory is not None
    while not stop.is_set():
        device = await metric(session, "computron_device_memory_bytes")
        host = await metric(session, "computron_host_memory_bytes")
        assert sum(device.values()) == config.device.memory // PAGE * PAGE
        assert all(value >= 0 for value in (*device.values(), *host.values()))
        assert 0 < host['node="0",state="used"'] <= config.host.memory
        scrapes += 1
        await asyncio.sleep(0.05)
    return scrapes


async def test_every_request_ends_and_nothing_leaks(serving, random_model) -> None:
    models = twelve_models(random_model)
    assert len(models) == 12
    config = Config(
        server=ServerConfig(log_level="warning"),
        device=DeviceConfig(
            kind="host", memory=9 * MIB, page_size=PAGE, chunk_size=PAGE, link_bandwidth=1e9, verify=True
        ),
        host=HostConfig(memory=20 * MIB, load_threads=2),  # less than all models take: some come from disk
        scheduler=SchedulerConfig(max_wait=20.0, max_queue=60),
        models=models,
    )
    rng = random.Random(5)
    process = psutil.Process()
    outcomes: list[Counter[str]] = []
    figures: list[tuple[int, int]] = []
    async with serving(config) as server:
        for requests in ROUNDS:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(server.url, connector=connector) as session:
                stop = asyncio.Event()
                watching = asyncio.create_task(watch_budgets(session, config, stop))
                calls = []
                for _ in range(requests):
                    path, body = body_for(rng.choice(models), rng)
                    patience = rng.uniform(0.0, 3.0) if rng.random() < 0.25 else 240.0
                    calls.append(ask(session, path, body, patience))
                assert server.node._crew is not None
                server.node._crew.worker.backend.inject_fault("copy", requests, "the link fell silent")
                outcomes.append(Counter(await asyncio.gather(*calls)))
                stop.set()
                assert await watching > 0
            async with asyncio.timeout(60):
                while server.node.snapshot().requests:  # those whose clients left end with their step
                    await asyncio.sleep(0.01)
                while any(c.status == psutil.CONN_ESTABLISHED for c in process.net_connections()):
                    await asyncio.sleep(0.01)
            server.node.check()
            gc.collect()
            figures.append((process.num_fds(), process.memory_info().rss))
        for counted in outcomes:
            assert set(counted) <= {"ok", "left"} | CLEAR_ERRORS, counted
            assert counted["ok"] > sum(counted.values()) / 4, counted
        snapshot = server.node.snapshot()
        assert snapshot.nodes[0].device_memory["cache"] == 0
        assert all(model.queue_depth == model.running == 0 for model in snapshot.models)
        assert snapshot.nodes[0].swaps["failed"] == len(ROUNDS)
        assert [sum(counted.values()) for counted in outcomes] == list(ROUNDS)
        (_, _), (files, memory), (last_files, last_memory) = figures
        assert last_files <= files, figures
        assert last_memory - memory < 32 * MIB, figures
