"""Models split over real node processes answer what transformers answers, alone, batched, and after swaps."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from tests.end_to_end.groups import group_of

MIB = 1 << 20
NEW_TOKENS = 10
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong potions near Lake Geneva"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 13] * (1 + i // 5)) for i in range(10)]


def group_config(tensor: int, pipeline: int, *models: ModelConfig, memory: int) -> Config:
    return Config(
        device=DeviceConfig(kind="host", memory=memory, page_size=MIB // 4),
        host=HostConfig(memory=600 * MIB),
        group=GroupConfig(tensor, pipeline),
        models=models,
    )


@pytest.fixture(scope="module")
def smollm2(demo) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as token ids, and what transformers continues them with."""
    tokenizer = AutoTokenizer.from_pretrained(demo.smollm2)
    model = AutoModelForCausalLM.from_pretrained(demo.smollm2, dtype=torch.float32)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(output[0, len(prompt) :].tolist())
    return prompts, answers


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 2), (1, 3), (3, 2)])
async def test_a_split_language_model_answers_as_a_whole_one(demo, smollm2, tmp_path, tensor, pipeline):
    prompts, expected = smollm2
    models = [ModelConfig(id=name, source=str(demo.smollm2), dtype="float32") for name in ("a", "b")]
    other = ModelConfig(id="other", source="random:opt-125m", dtype="float32", max_model_len=64)
    shard = 560 * MIB // (tensor * pipeline)
    config = group_config(tensor, pipeline, models[0], other, memory=shard + 100 * MIB)
    async with group_of(config, tmp_path) as group:

        async def answer(prompt):
            return await group.tokens("a", prompt, NEW_TOKENS)

        assert [await answer(prompt) for prompt in prompts[:3]] == expected[:3]
        for _ in range(2):
            await group.tokens("other", [1, 2, 3], 2)
            assert await asyncio.gather(*map(answer, prompts)) == expected
