"""A model that one pass answers has a step in each stage of a pipeline: each gives what it would give alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from computron.models.byte_tokenizer import byte_tokenizer
from tests.end_to_end.groups import Group, group_of
from tests.end_to_end.split_models import make_mlp

MIB = 1 << 20
WIDTH = 33
TEXTS = [[(7 * n + k) % 500 + 5 for k in range(1 + n % 9)] for n in range(40)]


def config(*models: ModelConfig, stages: int = 2, memory: int = 8 * MIB) -> Config:
    return Config(
        device=DeviceConfig(kind="host", memory=memory, page_size=64 << 10),
        host=HostConfig(memory=24 * MIB),
        group=GroupConfig(1, stages, recovery_timeout=60.0),
        models=models,
    )


def relay(folder: Path, total: int) -> ModelConfig:
    return ModelConfig(
        id="relay",
        task="custom",
        factory="tests.end_to_end.split_models:make_relay",
        arguments={"folder": str(folder), "total": total},
        max_batch_size=1,
    )


def mlp(name: str = "mlp", width: int = WIDTH) -> ModelConfig:
    return ModelConfig(
        id=name,
        task="custom",
        factory="tests.end_to_end.split_models:make_mlp",
        arguments={"width": width, "layers": 6},
        max_batch_size=1,
    )


async def infer(group: Group, model: str, given: list[float]) -> tuple[int, Any]:
    status, body = await group.post(f"/v1/models/{model}/infer", input=given)
    return status, body.get("output", body)


async def test_steps_of_one_model_are_in_different_stages_at_once(tmp_path):
    """Else the first one, whose second stage waits for another to begin, would fail."""
    async with group_of(config(relay(tmp_path, total=6)), tmp_path) as group:
        answers = await asyncio.gather(*(infer(group, "relay", [float(number)]) for number in range(6)))
    assert answers == [(200, [float(number)]) for number in range(6)]


async def test_a_step_that_fails_fails_its_own_requests_and_no_other(tmp_path):
    """It leaves what the first stage sent for it, which the next step must not take for its own."""
    numbers = [0.0, 1.0, -1.0, 2.0, 3.0]
    async with group_of(config(relay(tmp_path, total=5)), tmp_path) as group:
        answers = await asyncio.gather(*(infer(group, "relay", [number]) for number in numbers))
        assert [status for status, _ in answers] == [200, 200, 500, 200, 200], answers
        assert "-1 is negative" in answers[2][1]["error"]["message"]
        assert [answer for status, answer in answers if status == 200] == [[0.0], [1.0], [2.0], [3.0]]
        await group.ready()
        assert await infer(group, "relay", [4.0]) == (200, [4.0])


async def test_a_step_that_fails_leaves_the_one_ahead_of_it_alone(tmp_path):
    """That one takes its time in the last stage, and is not computed again."""
    patient = replace(
        relay(tmp_path, total=0),
        id="patient",
        factory="tests.end_to_end.split_models:make_patient",
        arguments={"folder": str(tmp_path)},
    )
    async with group_of(config(patient), tmp_path) as group:
        ahead = asyncio.ensure_future(infer(group, "patient", [1.0]))
        while not (tmp_path / "reached").exists():
            assert not ahead.done(), ahead.result()
            await asyncio.sleep(0.005)
        failing = asyncio.ensure_future(infer(group, "patient", [-1.0]))
        behind = asyncio.ensure_future(infer(group, "patient", [2.0]))
        assert await ahead == (200, [1.0])
        status, answer = await failing
        assert (status, "-1 is negative" in str(answer)) == (500, True)
        assert await behind == (200, [2.0])
    assert (tmp_path / "passed").read_text().split() == ["1", "2"]


@pytest.mark.parametrize("stages", [2, 3])
async def test_overlapped_steps_give_what_transformers_does(tmp_path, stages):
    """Texts of different lengths, one or two a step, while another model takes its turns."""
    shape = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128,
             "vocab_size": 512, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        embedder = BertModel(BertConfig(**shape)).eval()
    embedder.save_pretrained(tmp_path / "embed")
    byte_tokenizer(512).save_pretrained(tmp_path / "embed")
    with torch.inference_mode():
        hidden = [embedder(torch.tensor([text])).last_hidden_state[0].mean(0) for text in TEXTS]
        embedded = torch.nn.functional.normalize(torch.stack(hidden))
    inputs = torch.rand(20, WIDTH, generator=torch.Generator().manual_seed(2))
    served = config(
        ModelConfig(id="embed", source=str(tmp_path / "embed"), task="embed", dtype="float32", max_batch_size=2),
        mlp(),
        stages=stages,
    )
    async with group_of(served, tmp_path) as group:

        async def embed(text: list[int]) -> list[float]:
            status, body = await group.post("/v1/embeddings", model="embed", input=text)
            assert status == 200, body
            return list(body["data"][0]["embedding"])

        vectors, outputs = await asyncio.gather(
            asyncio.gather(*map(embed, TEXTS)),
            asyncio.gather(*(infer(group, "mlp", row.tolist()) for row in inputs)),
        )
    torch.testing.assert_close(torch.tensor(vectors), embedded, rtol=0, atol=1e-5)
    assert {status for status, _ in outputs} == {200}
    torch.testing.assert_close(torch.tensor([row for _, row in outputs]), make_mlp(WIDTH, 6)(inputs), rtol=0, atol=1e-5)


async def test_overlapped_steps_are_taken_up_again_when_a_node_dies(tmp_path):
    inputs = torch.rand(30, WIDTH, generator=torch.Generator().manual_seed(3))
    async with group_of(config(mlp()), tmp_path) as group:
        asked = [asyncio.ensure_future(infer(group, "mlp", row.tolist())) for row in inputs]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        group.kill(1)
        group.start(1)
        answers = await asyncio.gather(*asked)
    assert {status for status, _ in answers} == {200}, answers
    torch.testing.assert_close(torch.tensor([row for _, row in answers]), make_mlp(WIDTH, 6)(inputs), rtol=0, atol=1e-5)


async def test_models_that_never_pause_give_their_frames_to_each_other(tmp_path):
    """There is room for one of them; each is asked for without a gap."""
    widths = {"a": 256, "b": 250}
    served = config(*(mlp(name, width) for name, width in widths.items()), memory=int(1.0 * MIB))
    served = replace(served, scheduler=replace(served.scheduler, max_wait=0.5))
    async with group_of(served, tmp_path) as group:

        async def right(name: str) -> bool:
            status, output = await infer(group, name, [1.0] * widths[name])
            assert status == 200, output
            return torch.allclose(torch.tensor(output), expected[name], rtol=0, atol=1e-5)

        expected = {name: make_mlp(width, 6)(torch.ones(width)) for name, width in widths.items()}
        assert all(await asyncio.gather(*(right(name) for _ in range(60) for name in widths)))
        evicted = await group.metric("computron_evicted_pages_total")
    assert {name for name in widths if any(f'"{name}"' in labels for labels in evicted)} == {"a", "b"}
