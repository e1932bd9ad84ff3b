"""The real models, swapped in and out of too little memory, give what transformers and torch give."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from computron.config import Config, DeviceConfig, HostConfig, ModelConfig
from computron.execution.requests import EmbeddingOutput, EmbedJob, GenerateJob, SamplingParams, TextOutput
from computron.node.node import Node

MIB = 1 << 20
NEW_TOKENS = 12
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong potions near Lake Geneva"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 13] * (1 + i // 7)) for i in range(20)]
SENTENCES = ["A cat sleeps.", "The canteen serves lunch for four euros.", "Nothing.", " ".join(WORDS * 4)]
SWAP_CYCLES = 50


@pytest.fixture(scope="module")
def expected_tokens(demo) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo.smollm2)
    model = AutoModelForCausalLM.from_pretrained(demo.smollm2, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module")
def expected_embeddings(demo) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(demo.minilm)
    model = AutoModel.from_pretrained(demo.minilm).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask.unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def config(demo) -> Config:
    """SmolLM2 in float32 takes 514 MiB, MiniLM 87, EfficientNet 18: the first one and any other do not fit."""
    return Config(
        device=DeviceConfig(kind="host", memory=560 * MIB),
        host=HostConfig(memory=800 * MIB),
        models=(
            ModelConfig(id="smollm2", source=str(demo.smollm2), dtype="float32"),
            ModelConfig(id="minilm", source=str(demo.minilm), task="embed"),
            ModelConfig(
                id="efficientnet",
                task="custom",
                factory="examples.efficientnet:make",
                batch_manager="examples.efficientnet:ImageBatches",
                arguments={"folder": str(demo.efficientnet)},
            ),
        ),
    )


async def generate(node: Node, prompt: str, tokens: int = NEW_TOKENS) -> list[int]:
    ids = node.models["smollm2"].loaded.encode(prompt)
    job = GenerateJob(tuple(ids), SamplingParams(max_tokens=tokens, temperature=0.0))
    outputs = [output async for output in node.submit("smollm2", job, request_id="test")]
    return [token for output in outputs if isinstance(output, TextOutput) for token in output.tokens]


async def embed(node: Node, text: str) -> Sequence[float]:
    job = EmbedJob(tuple(node.models["minilm"].loaded.encode(text)))
    outputs = [output async for output in node.submit("minilm", job, request_id="test")]
    assert isinstance(outputs[0], EmbeddingOutput)
    return outputs[0].embedding


async def classes(url: str, picture: Path) -> list[int]:
    body = {"image": base64.b64encode(picture.read_bytes()).decode(), "top": 5}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/models/efficientnet/infer", json=body) as response,
    ):
        return [entry["index"] for entry in (await response.json())["output"]["classes"]]


def reference_classes(demo, picture: Path) -> list[int]:
    efficientnet = importlib.import_module("examples.efficientnet")
    module = efficientnet.make(str(demo.efficientnet)).eval()
    manager = efficientnet.ImageBatches(module)
    payload = manager.parse({"image": base64.b64encode(picture.read_bytes()).decode(), "top": 5})
    with torch.inference_mode():
        probabilities = module(*manager.make_batch([payload])).softmax(-1)[0]
    return probabilities.topk(5).indices.tolist()


def assert_device_holds_the_checkpoint(node: Node, folder: Path) -> None:
    module = node.models["smollm2"].loaded.module
    tensors = dict(module.named_parameters())
    with safe_open(folder / "model.safetensors", "pt") as checkpoint:
        for name in checkpoint.keys():  # noqa: SIM118 -- not a mapping
            expected = checkpoint.get_tensor(name).to(torch.float32)
            assert torch.equal(tensors[name].view(torch.int32), expected.view(torch.int32)), name


async def test_answers_equal_the_references_through_fifty_swap_cycles(
    demo, serving, expected_tokens, expected_embeddings
) -> None:
    pictures = sorted(demo.images.glob("*.jpg"))
    expected_classes = [reference_classes(demo, picture) for picture in pictures]
    async with serving(config(demo)) as server:
        node = server.node
        alone = [await generate(node, prompt) for prompt in PROMPTS]
        assert alone == expected_tokens
        assert await asyncio.gather(*(generate(node, prompt) for prompt in PROMPTS)) == expected_tokens

        for _ in range(SWAP_CYCLES):
            embedding = await embed(node, SENTENCES[0])
            assert max(abs(a - b) for a, b in zip(embedding, expected_embeddings[0].tolist(), strict=True)) < 1e-5
            assert len(await generate(node, "Hello", tokens=1)) == 1

        assert await asyncio.gather(*(generate(node, prompt) for prompt in PROMPTS)) == expected_tokens
        assert_device_holds_the_checkpoint(node, demo.smollm2)
        embeddings = torch.tensor(await asyncio.gather(*(embed(node, text) for text in SENTENCES)))
        assert torch.allclose(embeddings, expected_embeddings, rtol=0, atol=1e-5)
        assert [await classes(server.url, picture) for picture in pictures] == expected_classes
        assert await asyncio.gather(*(generate(node, prompt) for prompt in PROMPTS)) == expected_tokens

        snapshot = node.snapshot()
        assert snapshot.nodes[0].transfer_bytes > SWAP_CYCLES * 2 * 40 * MIB  # each cycle moved what did not fit
        node.check()
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/models") as response:
            listed = json.loads(await response.text())["data"]
        assert {model["id"] for model in listed} == {"smollm2", "minilm", "efficientnet"}
