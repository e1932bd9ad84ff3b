"""The whole node on a CUDA device: swaps over the real link, the same tokens as transformers gives there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from computron import _transfer
from computron.config import Config, DeviceConfig, HostConfig, ModelConfig
from computron.execution.requests import GenerateJob, SamplingParams, TextOutput
from computron.models.byte_tokenizer import byte_tokenizer
from computron.node.node import Node

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _transfer.cuda_unavailable_reason() is not None, reason=str(_transfer.cuda_unavailable_reason())
    ),
]

MIB = 1 << 20
PAGE = 2 * MIB
SIZES: dict[str, Any] = {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 2048}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, intermediate_size=1024, num_key_value_heads=4, eos_token_id=None, bos_token_id=None),
    "opt": OPTConfig(**SIZES, ffn_dim=1024, eos_token_id=None, bos_token_id=None),
}
PROMPTS = [[(7 * i * k) % 2000 + 5 for k in range(1, 2 + 9 * i)] for i in range(12)]


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, Path]:
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        byte_tokenizer(2048).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in CONFIGS}


def reference(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


async def generate(node: Node, model: str, prompt: list[int]) -> list[int]:
    job = GenerateJob(tuple(prompt), SamplingParams(max_tokens=10, temperature=0.0))
    outputs = [output async for output in node.submit(model, job, request_id="test")]
    return [token for output in outputs if isinstance(output, TextOutput) for token in output.tokens]


async def test_tokens_equal_transformers_through_verified_swaps(checkpoints) -> None:
    expected = {name: reference(folder) for name, folder in checkpoints.items()}
    torch.cuda.empty_cache()
    node = Node(
        Config(
            device=DeviceConfig(kind="cuda", memory=100 * MIB, page_size=PAGE, verify=True),
            host=HostConfig(memory=1 << 30),
            models=tuple(
                ModelConfig(id=name, source=str(folder), dtype="float32") for name, folder in checkpoints.items()
            ),
        )
    )
    await node.startup()
    try:
        for _ in range(5):
            for name in checkpoints:
                assert [await generate(node, name, prompt) for prompt in PROMPTS[:3]] == expected[name][:3]
        for name in checkpoints:
            assert await asyncio.gather(*(generate(node, name, prompt) for prompt in PROMPTS)) == expected[name]
        together = await asyncio.gather(
            *(generate(node, name, prompt) for prompt in PROMPTS for name in sorted(checkpoints))
        )
        assert together == [expected[name][i] for i in range(len(PROMPTS)) for name in sorted(checkpoints)]
        node.check()
    finally:
        await node.shutdown(drain=5.0)
