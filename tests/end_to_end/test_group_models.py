"""Small models of several kinds, served together by groups with room for one of them, answer as transformers does."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    OPTConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from computron.models.byte_tokenizer import byte_tokenizer
from tests.end_to_end.groups import Group, group_of

MIB = 1 << 20
GROUPS = [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]
NEW_TOKENS = 12
VOCABULARY = 512
LENGTHS = (1, 5, 33, 150, 290)  # the last one is cut into micro-batches where there are stages
LANGUAGE = ("llama", "opt")
_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "initializer_range": 0.3,  # answers that are not the same token over and over
}
_TEXT = {**_SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None}


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()


PROMPTS = [prompt(length) for length in LENGTHS]


def picture(seed: int) -> bytes:
    data = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(data, "PNG")
    return data.getvalue()


PICTURES = [picture(seed) for seed in range(3)]


@dataclass(frozen=True)
class Expected:
    """What transformers answers: the tokens of each language model to each prompt, [pictures, labels]."""

    folder: Path
    tokens: dict[str, list[list[int]]]
    probabilities: torch.Tensor


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Checkpoints of about 3.5 MB each with torch's own random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    configs = {
        "llama": LlamaConfig(**_TEXT, intermediate_size=384, num_key_value_heads=2),
        "opt": OPTConfig(**_TEXT, ffn_dim=512),
        "vit": ViTConfig(**_SMALL, intermediate_size=512, image_size=32, patch_size=8, num_labels=5),
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        modules = {
            name: (AutoModelForImageClassification if name == "vit" else AutoModelForCausalLM).from_config(config)
            for name, config in configs.items()
        }
    for name, module in modules.items():
        module.eval().save_pretrained(folder / name)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "vit")
    tokens = {}
    for name in LANGUAGE:
        byte_tokenizer(VOCABULARY).save_pretrained(folder / name)
        tokens[name] = [continued(modules[name], prompt) for prompt in PROMPTS]
        assert len({tuple(answer) for answer in tokens[name]}) == len(PROMPTS)
    pixels = processor(images=[Image.open(io.BytesIO(data)) for data in PICTURES], return_tensors="pt")
    with torch.inference_mode():
        probabilities = modules["vit"](**pixels).logits.softmax(-1)
    return Expected(folder, tokens, probabilities)


def continued(module: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = module.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def config(folder: Path, tensor: int, pipeline: int) -> Config:
    """Room for one of the models and some cache."""
    return Config(
        device=DeviceConfig(kind="host", memory=int(5.4 * MIB) // (tensor * pipeline) + MIB // 2, page_size=64 << 10),
        host=HostConfig(memory=24 * MIB),
        group=GroupConfig(tensor, pipeline),
        models=(
            *(ModelConfig(id=name, source=str(folder / name), dtype="float32") for name in LANGUAGE),
            ModelConfig(id="vit", source=str(folder / "vit"), task="classify"),
        ),
    )


async def greedy(group: Group, model: str) -> list[list[int]]:
    """To all prompts, at once."""
    return await asyncio.gather(*(group.tokens(model, prompt, NEW_TOKENS) for prompt in PROMPTS))


async def classified(group: Group, *pictures: bytes) -> torch.Tensor:
    """Probabilities, [pictures, labels]. The label that is told must be the likeliest one."""
    images = [base64.b64encode(data).decode() for data in pictures]
    status, body = await group.post("/v1/classify", model="vit", image=images)
    assert status == 200, body
    probabilities = torch.tensor([entry["probs"] for entry in body["data"]])
    assert [f"LABEL_{best}" for best in probabilities.argmax(-1)] == [entry["label"] for entry in body["data"]]
    return probabilities


async def scored(group: Group, model: str) -> list[dict[str, Any]]:
    """Answers to some prompts that were sampled, with the log probabilities of all tokens, also of the prompts."""
    bodies = [
        {"prompt": PROMPTS[2], "temperature": 1.0, "seed": 11},
        {"prompt": PROMPTS[4], "temperature": 0.8, "top_p": 0.9, "seed": 12, "prompt_logprobs": 3},
        {"prompt": PROMPTS[1], "temperature": 1.5, "top_k": 20, "seed": 13, "repetition_penalty": 1.2},
    ]
    common = {"max_tokens": NEW_TOKENS, "logprobs": 4, "return_token_ids": True, "return_tokens_as_token_ids": True}
    answers = await asyncio.gather(*(group.post("/v1/completions", model=model, **body, **common) for body in bodies))
    assert all(status == 200 for status, _ in answers), answers
    return [body["choices"][0] for _, body in answers]


def flat(logprobs: list[dict[str, float] | None]) -> dict[tuple[int, str], float]:
    """By position and token."""
    return {(at, token): value for at, tokens in enumerate(logprobs) for token, value in (tokens or {}).items()}


def assert_alike(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, right in zip(answers, expected, strict=True):
        assert answer["token_ids"] == right["token_ids"]
        own, theirs = answer["logprobs"], right["logprobs"]
        assert own["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-4)
        assert flat(own["top_logprobs"]) == pytest.approx(flat(theirs["top_logprobs"]), abs=1e-4)
        assert ("prompt_logprobs" in answer) == ("prompt_logprobs" in right)
        if "prompt_logprobs" in right:
            own, theirs = (
                flat(
                    [{token: entry["logprob"] for token, entry in (at or {}).items()} for at in each["prompt_logprobs"]]
                )
                for each in (answer, right)
            )
            assert len(theirs) >= 3 * (LENGTHS[4] - 1)
            assert own == pytest.approx(theirs, abs=1e-4)


@pytest.fixture(scope="module")
def alone(expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What a server of one node answers where it samples."""

    async def ask() -> dict[str, list[dict[str, Any]]]:
        async with group_of(config(expected.folder, 1, 1), tmp_path_factory.mktemp("alone")) as server:
            return {model: await scored(server, model) for model in LANGUAGE}

    return asyncio.run(ask())


@pytest.mark.parametrize(("tensor", "pipeline"), GROUPS)
async def test_split_models_answer_as_whole_ones(expected, alone, tmp_path, tensor, pipeline):
    async with group_of(config(expected.folder, tensor, pipeline), tmp_path) as group:
        for model in LANGUAGE:
            assert await group.tokens(model, PROMPTS[2], NEW_TOKENS) == expected.tokens[model][2]
            single = await classified(group, PICTURES[0])
            torch.testing.assert_close(single, expected.probabilities[:1], rtol=0, atol=1e-5)
        for model in LANGUAGE:
            assert await greedy(group, model) == expected.tokens[model]
            batch = await classified(group, *PICTURES)
            torch.testing.assert_close(batch, expected.probabilities, rtol=0, atol=1e-5)
            assert_alike(await scored(group, model), alone[model])
        both = await asyncio.gather(*(greedy(group, model) for model in LANGUAGE))
        assert both == [expected.tokens[model] for model in LANGUAGE]
        evicted = await group.metric("computron_evicted_pages_total")
        assert {name for name in ("llama", "opt", "vit") if any(f'"{name}"' in labels for labels in evicted)} == {
            "llama", "opt", "vit",
        }  # fmt: skip
