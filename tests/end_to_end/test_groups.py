"""Real models split over real node processes answer what transformers answers, alone, batched, and after swaps."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from tests.end_to_end.groups import Group, group_of

MIB = 1 << 20
NEW_TOKENS = 8
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong potions near Lake Geneva"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 13] * (1 + i // 5)) for i in range(0, 10, 2)]
SENTENCES = ["A cat sleeps.", "The canteen serves lunch for four euros.", "Nothing.", " ".join(WORDS * 4)]


def group_config(tensor: int, pipeline: int, *models: ModelConfig, memory: int) -> Config:
    return Config(
        device=DeviceConfig(kind="host", memory=memory, page_size=MIB // 4),
        host=HostConfig(memory=600 * MIB),
        group=GroupConfig(tensor, pipeline),
        models=models,
    )


@pytest.fixture(scope="module")
def continued(demo) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as token ids, and what transformers' SmolLM2 continues them with."""
    tokenizer = AutoTokenizer.from_pretrained(demo.smollm2)
    model = AutoModelForCausalLM.from_pretrained(demo.smollm2, dtype=torch.float32)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(output[0, len(prompt) :].tolist())
    return prompts, answers


@pytest.fixture(scope="module")
def embedded(demo) -> torch.Tensor:
    """[sentences, width]: MiniLM's embeddings by the recipe of sentence-transformers."""
    tokenizer = AutoTokenizer.from_pretrained(demo.minilm)
    model = AutoModel.from_pretrained(demo.minilm).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask.unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


async def embed(group: Group, *sentences: str, model: str = "minilm") -> torch.Tensor:
    """[sentences, width]"""
    status, body = await group.post("/v1/embeddings", model=model, input=sentences)
    assert status == 200, body
    return torch.tensor([entry["embedding"] for entry in body["data"]])


def assert_near(embeddings: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tensor", "pipeline", "largest"), [(3, 1, 172), (1, 2, 311), (1, 3, 217), (3, 2, 104)])
async def test_split_models_answer_as_whole_ones(demo, continued, embedded, tmp_path, tensor, pipeline, largest):
    """`largest`: MiB of the largest part of SmolLM2 in float32. There is room for it, but not for MiniLM beside it."""
    prompts, expected = continued
    config = group_config(
        tensor,
        pipeline,
        ModelConfig(id="smollm2", source=str(demo.smollm2), dtype="float32"),
        ModelConfig(id="minilm", source=str(demo.minilm), task="embed"),
        memory=(largest + 12) * MIB,
    )
    async with group_of(config, tmp_path) as group:

        async def answer(prompt: list[int]) -> list[int]:
            return await group.tokens("smollm2", prompt, NEW_TOKENS)

        assert await answer(prompts[1]) == expected[1]
        assert_near(await embed(group, SENTENCES[0]), embedded[:1])
        assert await asyncio.gather(*map(answer, prompts)) == expected
        assert_near(await embed(group, *SENTENCES), embedded)
        assert await answer(prompts[0]) == expected[0]
        evicted = await group.metric("computron_evicted_pages_total")
        assert any('"smollm2"' in labels for labels in evicted), evicted


async def test_embeddings_of_a_split_model_stay_the_same_after_swaps(demo, embedded, tmp_path):
    """MiniLM takes 87 MiB, and 43 in half precision."""
    config = group_config(
        2,
        1,
        ModelConfig(id="minilm", source=str(demo.minilm), task="embed"),
        ModelConfig(id="half", source=str(demo.minilm), task="embed", dtype="bfloat16"),
        memory=50 * MIB,
    )
    async with group_of(config, tmp_path) as group:
        for _ in range(3):
            assert_near(await embed(group, SENTENCES[3]), embedded[3:])
            half = await embed(group, *SENTENCES, model="half")
            assert ((half * embedded).sum(-1) > 0.999).all()
            assert_near(await embed(group, *SENTENCES), embedded)
        evicted = await group.metric("computron_evicted_pages_total")
        for name in ("minilm", "half"):
            assert any(f'"{name}"' in labels for labels in evicted), evicted
