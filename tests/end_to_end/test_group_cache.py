"""Stages whose cache blocks differ in size, and a cache that shrinks under sequences that go on."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig, SchedulerConfig
from computron.models import Shard, plan_model
from computron.models.byte_tokenizer import byte_tokenizer
from computron.node.worker import Worker
from tests.end_to_end.groups import Group, group_of
from tests.end_to_end.node_process import serve_node

MIB = 1 << 20
PAGE = 64 << 10
BATCH = 8
LONGEST = 256  # tokens of a sequence
VOCABULARY = 512
SMALL = 32  # frames of the cache of the stage with small blocks, at most
MEMORY = 72  # pages of a node: weights of a model are 25, all of its cache 64 on the one node and 32 on the other
MODELS = ("main", "other")


@dataclass(frozen=True)
class Question:
    model: str
    prompt: list[int]
    count: int
    answer: list[int]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of three layers with different weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    shape = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=LONGEST, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    for seed, name in enumerate(MODELS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
        byte_tokenizer(VOCABULARY).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def questions(checkpoints: Path) -> list[Question]:
    """Those that come early end early: the others' blocks are the upper ones. Answered by transformers."""
    rng = random.Random(5)
    sizes = [("main", rng.randint(120, 200), 4 + 6 * n if n < BATCH else rng.randint(4, 50)) for n in range(24)]
    sizes += [("other", rng.randint(1, 30), rng.randint(1, 4)) for _ in range(16)]
    found = []
    modules = {name: AutoModelForCausalLM.from_pretrained(checkpoints / name).eval() for name in MODELS}
    for model, length, count in sizes:
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        ids = torch.tensor([prompt])
        output = modules[model].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
        )
        found.append(Question(model, prompt, count, output[0, length:].tolist()))
    assert len({tuple(question.answer[:4]) for question in found}) > len(found) / 2
    return found


def served(checkpoints: Path) -> Config:
    return Config(
        device=DeviceConfig(kind="host", memory=MEMORY * PAGE, page_size=PAGE),
        host=HostConfig(memory=16 * MIB),
        scheduler=SchedulerConfig(max_wait=0.05),  # so short that caches in use have to shrink for the other model
        group=GroupConfig(1, 2),
        models=tuple(
            ModelConfig(id=name, source=str(checkpoints / name), dtype="float32", max_batch_size=BATCH)
            for name in MODELS
        ),
    )


def serve_and_tell(config: Config, environment: Mapping[str, object], log: str) -> None:
    """A node that says how many blocks it is told to move, and of how many frames it thinks the cache then is."""
    set_cache = Worker.set_cache

    def told(self: Worker, model: str, frames: int, moves: Mapping[int, int]) -> None:
        if moves:
            print(f"moves {len(moves)} blocks of {model}: {frames} frames", flush=True)
        set_cache(self, model, frames, moves)

    Worker.set_cache = told  # type: ignore[method-assign]
    serve_node(config, environment, log)


async def ask_all(group: Group, questions: list[Question]) -> None:
    """Everything at once, but that the other model is asked whenever a sequence of the main one has ended."""
    others = itertools.cycle(question for question in questions if question.model == "other")

    async def ask(question: Question) -> None:
        assert await group.tokens(question.model, question.prompt, question.count) == question.answer
        if question.model == "main":
            await ask(next(others))

    async with asyncio.TaskGroup() as asking:
        for question in questions:
            if question.model == "main":
                asking.create_task(ask(question))


def moves(logs: Path, rank: int) -> list[str]:
    return re.findall(r"^moves .*$", (logs / f"node-{rank}.log").read_text(), re.MULTILINE)


async def test_blocks_move_in_a_cache_that_shrinks_where_blocks_of_the_stages_differ_in_size(
    checkpoints, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr("tests.end_to_end.node_process.serve_node", serve_and_tell)
    config = served(checkpoints)
    parts = [plan_model(config.models[0], Shard(1, 0, 2, stage)) for stage in range(2)]
    assert sorted(part.cache.layers for part in parts) == [1, 2]
    async with group_of(config, tmp_path) as group:
        await ask_all(group, questions)
    assert moves(tmp_path, 0) == moves(tmp_path, 1)
    frames = [int(line.split()[-2]) for line in moves(tmp_path, 0)]
    assert any(left >= SMALL for left in frames), "no blocks moved while the small cache stayed as large"
    assert any(left < SMALL for left in frames), "no blocks moved while both caches shrank"
