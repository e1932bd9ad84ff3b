"""A group behaves as a server of one node does: the same answers and refusals, memory told of all nodes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
import pytest_asyncio
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, OPTConfig, ViTConfig, ViTImageProcessorPil

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig, SchedulerConfig
from computron.models import Shard, plan_model
from computron.models.byte_tokenizer import byte_tokenizer
from tests.end_to_end.groups import Group, group_of
from tests.end_to_end.split_models import make_mlp

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGE = 64 << 10
LAYERS = 4
_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "initializer_range": 0.3,
}
_TEXT = {**_SMALL, "vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and tuned, which differs in the first layer's MLP (llama); random: opt, bert, vit."""
    folder = tmp_path_factory.mktemp("checkpoints")
    module = AutoModelForCausalLM.from_config(LlamaConfig(**_TEXT, intermediate_size=384, num_key_value_heads=2))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module.apply(module._initialize_weights)
        module.save_pretrained(folder / "base")
        module.model.layers[0].mlp.down_proj.weight.data.normal_()
        module.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        byte_tokenizer(512).save_pretrained(folder / name)
    OPTConfig(**_TEXT, ffn_dim=512).save_pretrained(folder / "opt")
    BertConfig(**_TEXT, intermediate_size=256, num_labels=3).save_pretrained(folder / "bert")
    ViTConfig(**_SMALL, intermediate_size=256, image_size=32, patch_size=8, num_labels=5).save_pretrained(
        folder / "vit"
    )
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return folder


def served(checkpoints: Path, tensor: int, pipeline: int) -> Config:
    """Room for base and about a half of opt."""
    nodes = tensor * pipeline
    return Config(
        device=DeviceConfig(kind="host", memory=6 * MIB // nodes, page_size=PAGE),
        host=HostConfig(memory=48 * MIB),
        group=GroupConfig(tensor, pipeline),
        scheduler=SchedulerConfig(prefetch=False),
        models=(
            *(ModelConfig(id=name, source=str(checkpoints / name), dtype="float32") for name in ("base", "tuned")),
            ModelConfig(id="opt", source=f"random:{checkpoints / 'opt'}", dtype="float32", max_batch_size=1),
            ModelConfig(id="embed", source=f"random:{checkpoints / 'bert'}", dtype="float32", task="embed"),
            ModelConfig(id="texts", source=f"random:{checkpoints / 'bert'}", dtype="float32", task="classify"),
            ModelConfig(id="images", source=f"random:{checkpoints / 'vit'}", dtype="float32", task="classify"),
            ModelConfig(
                id="mlp",
                task="custom",
                factory="tests.end_to_end.split_models:make_mlp",
                arguments={"width": 99, "layers": 5},
            ),
        ),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[(2, 1), (1, 2)], ids=["tensor", "pipeline"])
async def group(
    request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Group]:
    async with group_of(served(checkpoints, *request.param), tmp_path_factory.mktemp("group")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Group]:
    async with group_of(served(checkpoints, 1, 1), tmp_path_factory.mktemp("alone")) as started:
        yield started


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what comes within seconds, such as another node's figures."""
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


async def model(group: Group, name: str) -> dict[str, Any]:
    async with group.session.get(f"{group.url}/v1/models/{name}") as response:
        return dict(await response.json())


async def moved(group: Group) -> list[int]:
    """Bytes that each node has moved to its device, once all have told of the last swap."""

    async def told() -> bool:
        by_node = await group.metric("computron_transfer_bytes_total")
        return sum(by_node.values()) == sum((await group.metric("computron_swap_in_bytes_total")).values())

    await until(told)
    by_node = await group.metric("computron_transfer_bytes_total")
    return [int(by_node[f'node="{rank}"']) for rank in range(group.size)]


async def empty(group: Group) -> None:
    """Take all models off the devices."""
    for each in group.config.models:
        await group.post(f"/v1/models/{each.id}/unload")
        await until(lambda name=each.id: absent(group, name))


async def absent(group: Group, name: str) -> bool:
    return bool((await model(group, name))["state"] == "absent")


def shards(group: Group, name: str) -> list[Any]:
    """Each node's plan of the model."""
    (config,) = (each for each in group.config.models if each.id == name)
    sizes = group.config.group.tensor_parallel, group.config.group.pipeline_parallel
    return [plan_model(config, Shard.of_rank(rank, *sizes)) for rank in range(group.size)]


# Answers and refusals


def picture() -> str:
    data = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "base", "prompt": "Say:", "temperature": 0, "return_token_ids": True}),
    ("/v1/completions", {"model": "opt", "prompt": ["a", "bc"], "n": 2, "seed": 7, "logprobs": 2, "max_tokens": 9}),
    ("/v1/completions", {"model": "base", "prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 0}),
    ("/v1/completions", {"model": "base", "prompt": list(range(300)), "seed": 1, "prompt_logprobs": 1}),
    ("/v1/completions", {"model": "base", "prompt": "x", "seed": 1, "logit_bias": {"65": 100}, "stop": ["bbb"]}),
    ("/v1/completions", {"model": "base", "prompt": "x", "seed": 1, "frequency_penalty": 1.5, "min_tokens": 3}),
    ("/v1/chat/completions", {"model": "tuned", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}),
    (
        "/v1/chat/completions",
        {"model": "tuned", "messages": MESSAGES, "seed": 3, "max_tokens": 9, "logprobs": True, "top_logprobs": 2},
    ),
    ("/v1/embeddings", {"model": "embed", "input": ["one", "another one", "x" * 90]}),
    ("/v1/classify", {"model": "texts", "input": ["one", "another one"]}),
    ("/v1/classify", {"model": "images", "image": picture()}),
    ("/v1/models/mlp/infer", {"input": [number / 99 for number in range(99)]}),
    ("/tokenize", {"model": "base", "prompt": "text"}),
    ("/v1/completions", {"model": "nothing", "prompt": "x"}),
    ("/v1/completions", {"model": "embed", "prompt": "x"}),
    ("/v1/completions", {"model": "base", "prompt": [512]}),
    ("/v1/completions", {"model": "base", "prompt": list(range(500)), "max_tokens": 100}),
    ("/v1/completions", {"model": "base", "prompt": "x", "temperature": -1}),
    ("/v1/embeddings", {"model": "embed", "input": "x" * 600}),
    ("/v1/classify", {"model": "images", "image": "no image"}),
    ("/v1/models/mlp/infer", {"nothing": 1}),
]
MADE_ANEW = ("id", "created", "request_id")


def assert_alike(answer: Any, expected: Any, where: str) -> None:
    """The same but for names and times, and for rounding."""
    match expected:
        case dict():
            assert answer.keys() == expected.keys(), where
            for key in expected.keys() - set(MADE_ANEW):
                assert_alike(answer[key], expected[key], f"{where}.{key}")
        case list():
            assert len(answer) == len(expected), where
            for number, (one, other) in enumerate(zip(answer, expected, strict=True)):
                assert_alike(one, other, f"{where}[{number}]")
        case float():
            assert answer == pytest.approx(expected, abs=1e-4), where
        case _:
            assert answer == expected, where


async def test_answers_and_refusals_are_those_of_one_node(group, alone):
    together = await asyncio.gather(*(group.post(path, **body) for path, body in CALLS))
    for (path, body), answer in zip(CALLS, together, strict=True):
        expected = await alone.post(path, **body)
        assert_alike(list(answer), list(expected), f"{path} {body}"[:200])
        assert_alike(list(await group.post(path, **body)), list(expected), f"{path} {body}"[:200])


async def test_a_stream_gives_what_a_whole_answer_does(group):
    body = {"model": "base", "prompt": [1, 2, 3], "max_tokens": 20, "seed": 5, "return_token_ids": True}
    _, whole = await group.post("/v1/completions", **body)
    tokens, events = [], 0
    async with group.session.post(f"{group.url}/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                events += 1
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    assert tokens == whole["choices"][0]["token_ids"]
    assert events > 1


async def test_the_official_client_works(group):
    async with openai.AsyncOpenAI(base_url=f"{group.url}/v1", api_key="key") as client:
        ask = {"model": "base", "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
        whole = await client.chat.completions.create(**ask)
        stream = await client.chat.completions.create(**ask, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == whole.choices[0].message.content
        assert whole.usage.completion_tokens == 10
        embeddings = await client.embeddings.create(model="embed", input=["a", "b"])
        assert len(embeddings.data) == 2
        assert {each.id async for each in client.models.list()} == {each.id for each in group.config.models}
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nothing", messages=MESSAGES)


# Requests that end early


async def test_a_client_that_leaves_frees_its_place(group):
    """opt runs one request at a time."""
    body = {"model": "opt", "prompt": [1], "max_tokens": 350, "ignore_eos": True, "stream": True}
    outcome = 'model="opt",outcome="cancelled"'
    before = (await group.metric("computron_requests_total")).get(outcome, 0)

    async def queued(count: int) -> bool:
        return (await group.metric("computron_queue_depth"))['model="opt"'] == count

    async def ask() -> aiohttp.ClientResponse:
        response = await group.session.post(f"{group.url}/v1/completions", json=body)
        assert response.status == 200
        return response

    first = await ask()
    await first.content.readline()
    second, third = asyncio.ensure_future(ask()), asyncio.ensure_future(ask())
    await until(lambda: queued(2))
    assert (await model(group, "opt"))["running"] == 1
    first.close()
    await until(lambda: queued(1))
    for waiting in (second, third):
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await waiting).close()

    async def all_gone() -> bool:
        state = await model(group, "opt")
        counted = (await group.metric("computron_requests_total")).get(outcome, 0)
        return state["running"] == state["queue_depth"] == 0 and counted == before + 3

    await until(all_gone)
    await group.tokens("opt", [1], 3)


# Memory


async def test_the_bytes_of_a_model_are_those_of_all_its_shards(group):
    for each in group.config.models:
        expected = [plan.image.nbytes for plan in shards(group, each.id)]
        assert (await model(group, each.id))["bytes"] == sum(expected)
        assert len(expected) == 2
        assert all(expected)


async def test_metrics_tell_of_each_node(group):
    frames = group.config.device.memory // PAGE * PAGE
    for name, total in (("device", frames), ("host", group.config.host.memory)):
        figures = await group.metric(f"computron_{name}_memory_bytes")
        for rank in range(group.size):
            of_node = [value for labels, value in figures.items() if f'node="{rank}"' in labels]
            assert sum(of_node) == total
    for name in ("computron_transfer_bytes_total", "computron_link_busy_seconds_total", "computron_swaps_total"):
        assert {labels.split(",")[0] for labels in await group.metric(name)} == {'node="0"', 'node="1"'}
    assert await group.metric("computron_nodes_missing") == {"": 0}


async def test_models_come_and_go_as_an_operator_orders(group):
    await empty(group)
    before = await moved(group)
    assert (await group.post("/v1/models/base/load"))[0] == 202

    async def resident() -> bool:
        return bool((await model(group, "base"))["state"] == "resident")

    await until(resident)
    sizes = [plan.image.nbytes for plan in shards(group, "base")]
    assert [after - first for first, after in zip(before, await moved(group), strict=True)] == sizes
    assert (await group.post("/v1/models/base/unload"))[0] == 202
    await until(lambda: absent(group, "base"))

    async def free() -> bool:
        parameters = await group.metric("computron_device_memory_bytes")
        return all(value == 0 for labels, value in parameters.items() if '"parameters"' in labels)

    await until(free)


async def test_only_missing_pages_move(group):
    await empty(group)
    await group.tokens("base", [1, 2, 3], 2)
    await group.tokens("opt", [1, 2, 3], 2)
    share = (await model(group, "base"))["resident_ratio"]
    assert 0.1 < share < 0.9
    before = await moved(group)
    await group.tokens("base", [1, 2, 3], 2)
    for rank, plan in enumerate(shards(group, "base")):
        brought = (await moved(group))[rank] - before[rank]
        # The pages that a smaller shard lacks are none that it has to bring.
        assert 0 < brought <= plan.image.nbytes * (1 - share) + 2 * PAGE


async def test_fine_tunes_share_the_pages_that_are_equal(group):
    """Where there are stages, a page is shared only if it is equal on all of them."""
    await empty(group)
    await group.tokens("base", [1, 2, 3], 2)
    between = await moved(group)
    await group.tokens("tuned", [1, 2, 3], 2)
    changed = 128 * 384 * 4 // group.config.group.tensor_parallel
    for before, after in zip(between, await moved(group), strict=True):
        assert 0 < after - before <= changed + 2 * PAGE
    shared = await group.metric("computron_pages_shared_total")
    assert shared[""] > 20
    assert await group.tokens("base", [1, 2, 3], 8) != await group.tokens("tuned", [1, 2, 3], 8)


# Custom models


async def test_a_custom_model_that_splits_itself_computes_what_the_whole_one_does(group):
    inputs = torch.rand(6, 99, generator=torch.Generator().manual_seed(2))
    expected = make_mlp(99, 5)(inputs)
    answers = await asyncio.gather(*(group.post("/v1/models/mlp/infer", input=row.tolist()) for row in inputs))
    outputs = torch.tensor([body["output"] for _, body in answers])
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-5)


async def test_a_model_that_raises_fails_what_ran_with_it_and_nothing_later(group):
    status, body = await group.post("/v1/models/mlp/infer", input=[1.0, 2.0])
    assert (status, body["error"]["code"]) == (500, "execution_failed")
    assert "shapes cannot be multiplied" in body["error"]["message"]
    await group.ready()  # stages have been freed from each other
    status, body = await group.post("/v1/models/mlp/infer", input=[1.0] * 99)
    assert status == 200
    torch.testing.assert_close(torch.tensor(body["output"]), make_mlp(99, 5)(torch.ones(99)), rtol=0, atol=1e-5)


async def test_a_custom_model_that_cannot_be_split_ends_the_start_with_the_reason(checkpoints, tmp_path):
    config = served(checkpoints, 2, 1)
    whole = ModelConfig(id="whole", task="custom", factory="examples.mlp:make", arguments={"sizes": [4, 8]})
    group = Group(replace(config, models=(whole,)), tmp_path)
    async with aiohttp.ClientSession() as group.session:
        try:
            group.start(0)
            assert await group.ended(0) == 3
            assert 'its factory examples.mlp:make takes no keyword argument "shard"' in group.log(0)
        finally:
            await group.stop()


async def test_two_models_are_in_different_stages_at_once(checkpoints, tmp_path):
    """The second stage of each waits for the first stage of the other."""
    meetings = tuple(
        ModelConfig(
            id=own,
            task="custom",
            factory="tests.end_to_end.split_models:make_meeting",
            arguments={"folder": str(tmp_path), "own": own, "other": other},
        )
        for own, other in (("a", "b"), ("b", "a"))
    )
    async with group_of(replace(served(checkpoints, 1, 2), models=meetings), tmp_path) as group:
        answers = await asyncio.gather(*(group.post(f"/v1/models/{name}/infer", input=[2.0]) for name in "ab"))
        assert [(status, body.get("output")) for status, body in answers] == [(200, [2.0])] * 2, answers
