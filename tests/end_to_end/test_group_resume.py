"""A node is killed in the middle of a step; what was asked is answered as if nothing had been."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import BertConfig, LlamaConfig

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig
from computron.execution.executor import make_runner
from computron.execution.protocols import Runner
from computron.execution.steps import StepInput, StepOutput
from computron.memory.gate import Gate
from computron.models import LoadedModel
from computron.models.byte_tokenizer import byte_tokenizer
from computron.node import worker
from tests.end_to_end.groups import Group, group_of
from tests.end_to_end.node_process import serve_node

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
VOCABULARY = 512
WIDTH = 33
TOKENS = 40  # of an answer
OUT = 8  # tokens that every stream has given when the node dies
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LETTERS = byte_tokenizer(VOCABULARY).encode("abcd")
SAMPLED = {
    "model": "llm", "max_tokens": TOKENS, "temperature": 1.5, "return_token_ids": True,
    "logit_bias": {str(letter): 90 for letter in LETTERS}, "frequency_penalty": 0.5,
}  # fmt: skip
COMPLETIONS: dict[str, dict[str, Any]] = {
    "penalties": {"prompt": "p", "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.7, "logprobs": 3},
    "free": {"prompt": "s", "seed": 2},
    "echo": {"prompt": "echo this " * 12, "seed": 3, "echo": True, "logprobs": 1, "prompt_logprobs": 2},
    "several": {"prompt": ["x", "yz"], "seed": 4, "n": 2, "top_p": 0.9, "top_k": 3},
    "least": {"prompt": "m", "seed": 5, "min_tokens": 28, "stop_token_ids": LETTERS},
    "greedy": {"prompt": list(range(70)), "temperature": 0, "logit_bias": None, "frequency_penalty": 0},
}
CHAT = {"model": "llm", "messages": [{"role": "user", "content": "hi"}], "seed": 6, "max_tokens": TOKENS,
        "logprobs": True, "top_logprobs": 2}  # fmt: skip
SINGLE_PASS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "embed": [("/v1/embeddings", {"model": "embed", "input": ["x" * length for length in range(1, 7)]})],
    "classify": [("/v1/classify", {"model": "classify", "input": ["y" * length for length in range(1, 7)]})],
    "mlp": [("/v1/models/mlp/infer", {"input": [n * k / 99 for k in range(WIDTH)]}) for n in range(6)],
}
Answers = dict[str, Any]


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Single-pass models take two inputs a step. Not all models fit on the devices."""
    folder = tmp_path_factory.mktemp("models")
    LlamaConfig(**_SHAPE, num_key_value_heads=2).save_pretrained(folder / "llama")
    BertConfig(**_SHAPE, num_labels=3).save_pretrained(folder / "bert")
    mlp = "tests.end_to_end.split_models:make_mlp"
    bert = {"source": f"random:{folder / 'bert'}", "dtype": "float32", "max_batch_size": 2}
    return Config(
        device=DeviceConfig(kind="host", memory=4 * MIB, page_size=64 << 10),
        host=HostConfig(memory=24 * MIB),
        group=GroupConfig(*request.param, recovery_timeout=60.0),
        models=(
            ModelConfig(
                id="llm", source=f"random:{folder / 'llama'}", dtype="float32", max_batch_size=32, max_batch_tokens=64
            ),
            ModelConfig(id="embed", task="embed", **bert),
            ModelConfig(id="classify", task="classify", **bert),
            ModelConfig(
                id="mlp", task="custom", factory=mlp, arguments={"width": WIDTH, "layers": 4}, max_batch_size=2
            ),
        ),
    )


def serve_and_hold(config: Config, environment: Mapping[str, object], log: str) -> None:
    """A node. From when a file hold-MODEL says n, node 1 hangs in the model's n-th step, having made held-MODEL."""
    if environment["RANK"] == 1:
        worker.make_runner = partial(holding_runner, Path(log).parent)
    serve_node(config, environment, log)


def holding_runner(folder: Path, model: LoadedModel, cache: torch.Tensor | None) -> Runner:
    runner: Any = make_runner(model, cache)
    run, name = runner.run, model.plan.config.id
    steps = itertools.count(1)

    def held(step: StepInput, gate: Gate) -> StepOutput | None:
        order = folder / f"hold-{name}"
        if order.exists() and next(steps) == int(order.read_text()):
            (folder / f"held-{name}").touch()
            threading.Event().wait()
        return run(step, gate)

    runner.run = held
    return runner


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(config: Config, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Group]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.end_to_end.node_process.serve_node", serve_and_hold)
        async with group_of(config, tmp_path_factory.mktemp("group")) as started:
            yield started


async def until_there(file: Path) -> None:
    async with asyncio.timeout(30):
        while not file.exists():
            await asyncio.sleep(0.005)


async def whole(group: Group, path: str, body: dict[str, Any]) -> Any:
    status, answer = await group.post(path, **body)
    assert status == 200, answer
    return answer


async def streamed(group: Group, body: dict[str, Any], count: int, out: asyncio.Event) -> dict[int, dict[str, Any]]:
    """A completion's `count` choices, put together from its stream. `out` is set when all have given OUT tokens."""
    choices: dict[int, dict[str, Any]] = {}
    ended = ""
    async with group.session.post(f"{group.url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    put_together(choices.setdefault(choice["index"], {}), choice)
                if len(choices) == count and all(len(c["token_ids"]) >= OUT for c in choices.values()):
                    out.set()
            ended = line.decode().strip() or ended
    assert ended == "data: [DONE]"
    return choices


def put_together(known: dict[str, Any], chunk: dict[str, Any]) -> None:
    for key, value in chunk.items():
        if isinstance(value, dict):
            put_together(known.setdefault(key, {}), value)
        elif isinstance(value, str | list) and key != "prompt_logprobs" and known.get(key) is not None:
            known[key] += value
        elif value is not None or key not in known:
            known[key] = value


def assert_alike(answer: Any, expected: Any, where: str) -> None:
    """The same but for what names the request, and for rounding."""
    if isinstance(expected, dict):
        assert answer.keys() == expected.keys(), where
        for key in expected.keys() - {"id", "created"}:
            assert_alike(answer[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(answer) == len(expected), where
        for number, (one, other) in enumerate(zip(answer, expected, strict=True)):
            assert_alike(one, other, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert answer == pytest.approx(expected, abs=1e-3), where
    else:
        assert answer == expected, where


class Calls:
    """Everything that is asked, at once; each answer under a name."""

    def __init__(self, group: Group, completions: Mapping[str, dict[str, Any]]) -> None:
        self._group = group
        self._streams = {name: asyncio.Event() for name in completions}
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        for name, body in completions.items():
            asked = SAMPLED | body
            self._start(name, whole(group, "/v1/completions", asked))
            asked = asked | {"prompt_logprobs": None}  # not offered in streams
            count = 4 if name == "several" else 1
            self._start(f"{name}, streamed", streamed(group, asked, count, self._streams[name]))
        self._start("chat", whole(group, "/v1/chat/completions", CHAT))

    async def __aenter__(self) -> Calls:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start(self, name: str, call: Any) -> None:
        self._tasks[name] = asyncio.ensure_future(call)

    def ask_single_pass(self) -> None:
        for model, calls in SINGLE_PASS.items():
            for number, (path, body) in enumerate(calls):
                self._start(f"{model} {number}", whole(self._group, path, body))

    async def some_tokens_out(self) -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*(event.wait() for event in self._streams.values()))

    def some_out(self) -> bool:
        return any(event.is_set() for event in self._streams.values())

    def unfinished(self) -> set[str]:
        return {name for name, task in self._tasks.items() if not task.done()}

    async def answers(self) -> Answers:
        return dict(zip(self._tasks, await asyncio.gather(*self._tasks.values()), strict=True))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def completions(group: Group) -> dict[str, dict[str, Any]]:
    """Those that are asked; one of them is stopped late by a text, and holds text back before, which others begin."""
    text = (await whole(group, "/v1/completions", SAMPLED | COMPLETIONS["free"]))["choices"][0]["text"]
    end = next(n for n in range(32, TOKENS) if text.find(text[n - 6 : n]) == n - 6)
    stops = [text[4:16] + "x", text[18:26] + "x", text[end - 6 : end]]
    return COMPLETIONS | {"stopped": {**COMPLETIONS["free"], "stop": stops}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(group: Group, completions: dict[str, dict[str, Any]]) -> Answers:
    async with Calls(group, completions) as calls:
        calls.ask_single_pass()
        answers = await calls.answers()
    for name in completions:
        choices = answers[name]["choices"]
        for index, choice in answers[f"{name}, streamed"].items():
            for key in ("text", "token_ids", "finish_reason", "logprobs"):
                assert_alike(choice[key], choices[index][key], f"{name}.{key}")
        lengths = [len(choice["token_ids"]) for choice in choices]
        assert lengths == [{"least": 29, "stopped": lengths[0]}.get(name, TOKENS)] * len(choices), name
    assert answers["stopped"]["choices"][0]["finish_reason"] == "stop"
    assert len(set(answers["penalties"]["choices"][0]["token_ids"])) > 2
    return answers


async def break_in_step(group: Group, model: str, step: int) -> None:
    """Let node 1 begin the model's n-th step from now on, and die in it."""
    hold, held = (group.logs / f"{word}-{model}" for word in ("hold", "held"))
    hold.write_text(str(step))
    await until_there(held)
    hold.unlink()
    held.unlink()
    group.kill(1)
    group.start(1)


def assert_as_undisturbed(answers: Answers, undisturbed: Answers) -> None:
    for name, answer in answers.items():
        assert_alike(answer, undisturbed[name], name)


async def test_answers_go_on_where_they_were_though_it_happens_twice(group, completions, undisturbed):
    everything = {"chat", *completions, *(f"{name}, streamed" for name in completions)}
    async with Calls(group, completions) as calls:
        await calls.some_tokens_out()
        await break_in_step(group, "llm", 1)
        assert calls.unfinished() == everything
        await break_in_step(group, "llm", 6)
        assert calls.unfinished() == everything
        assert_as_undisturbed(await calls.answers(), undisturbed)


async def test_prompts_that_are_half_read_are_read_again(group, completions, undisturbed):
    async with Calls(group, completions) as calls:
        await break_in_step(group, "llm", 4)
        assert not calls.some_out()
        assert_as_undisturbed(await calls.answers(), undisturbed)


@pytest.mark.parametrize("model", SINGLE_PASS)
async def test_inputs_are_computed_again_with_those_that_wait(group, completions, undisturbed, model):
    few = {name: completions[name] for name in ("penalties", "stopped")}
    async with Calls(group, few) as calls:
        calls.ask_single_pass()
        await break_in_step(group, model, 2)
        assert any(name.startswith(model) for name in calls.unfinished())
        assert_as_undisturbed(await calls.answers(), undisturbed)
