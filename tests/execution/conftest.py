"""Small checkpoints with random weights, and a rig that runs an executor the way a node does, without a scheduler."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    ViTConfig,
    ViTImageProcessorPil,
)

from computron.config import ModelConfig
from computron.execution.executor import make_executor, make_runner, run_step
from computron.execution.protocols import Runner
from computron.execution.requests import GenerateJob, Job, Output, SamplingParams, StepResult, TextOutput, TokenLogprob
from computron.execution.steps import StepInput, StepOutput
from computron.group.codec import decode, encode
from computron.models import Gate, LoadedModel, OpenGate, load_model, plan_model
from computron.models.byte_tokenizer import byte_tokenizer
from computron.models.demo import DemoModels
from computron.models.shard import Shard

VOCABULARY = 300
FRAME_BYTES = 1 << 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "gpt2": lambda: GPT2Config(**_COMMON),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8, sliding_window=12, query_pre_attn_scalar=8),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=11),
    # Keys and values of different size.
    "deepseek": lambda: DeepseekV3Config(
        **{**_GROUPED, "num_key_value_heads": 4},
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=3,
    ),
    # Attention sinks, beside sliding windows in every other layer.
    "gpt_oss": lambda: GptOssConfig(
        **_GROUPED, head_dim=8, sliding_window=12, num_local_experts=2, num_experts_per_tok=1, rope_parameters=_PLAIN
    ),
}


def random_model(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model in which every parameter matters, also those that would start as zeros and ones."""
    torch.manual_seed(7)
    model: PreTrainedModel = auto_class.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


class Answer:
    """All that one request gave."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.outputs = list(outputs)
        self.texts = [output for output in outputs if isinstance(output, TextOutput)]

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.texts for token in output.tokens]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.texts)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [each for output in self.texts for each in output.logprobs]

    @property
    def finish(self) -> tuple[str | None, str | int | None]:
        assert all(output.finish_reason is None for output in self.texts[:-1])
        return self.texts[-1].finish_reason, self.texts[-1].stop_reason


def new_cache(model: LoadedModel, cache_bytes: int) -> torch.Tensor | None:
    if model.plan.cache is None:
        return None
    return torch.full((cache_bytes,), 0xFF, dtype=torch.uint8, device=model.device)


class Rig:
    """One model and its executor. Frames of the cache are "mapped" up to `frames`; what lies beyond holds NaNs."""

    def __init__(self, model: LoadedModel, cache_bytes: int = 4 << 20) -> None:
        self.cache = new_cache(model, cache_bytes)
        self.runner = make_runner(model, self.cache)
        self._lead(model, [self.runner])
        if self.cache is not None:
            self.set_cache(cache_bytes // FRAME_BYTES)

    def _lead(self, model: LoadedModel, runners: Sequence[Runner]) -> None:
        self.model = model
        self.executor = make_executor(model, FRAME_BYTES, runners[0].block_bytes, runners[0].capacity)
        self.executor.limit_cache(max(r.block_bytes for r in runners), min(r.capacity for r in runners))
        self._ids = itertools.count()

    def set_cache(self, frames: int) -> None:
        self.runner.move_cache(self.executor.set_cache(frames))

    def add(self, job: Job) -> int:
        request = next(self._ids)
        self.executor.prepare(job)
        self.executor.add(request, job)
        return request

    def step(self, requests: Sequence[int], gate: Gate | None = None) -> StepResult:
        return run_step(self.executor, self.runner, requests, gate or OpenGate())

    def run(self, jobs: Sequence[Job], on_step: Callable[[int, list[int]], None] | None = None) -> list[Answer]:
        """Run all jobs together to their end. `on_step(step, running)` is called before each step."""
        requests = [self.add(job) for job in jobs]
        outputs: dict[int, list[Output]] = {request: [] for request in requests}
        running = list(requests)
        for step in itertools.count():
            if not running:
                break
            if on_step is not None:
                on_step(step, running)
            result = self.step(running)
            for output in result.outputs:
                outputs[output.request].append(output)
            running = [request for request in running if request not in result.finished]
        return [Answer(outputs[request]) for request in requests]


class GroupRig(Rig):
    """An executor and the runners of several nodes, to which steps travel, and from one of them the output back."""

    def __init__(self, models: Sequence[LoadedModel], cache_bytes: int = 4 << 20) -> None:
        self.caches = [new_cache(model, cache_bytes) for model in models]
        self.runners = [make_runner(model, cache) for model, cache in zip(models, self.caches, strict=True)]
        self.steps: list[StepInput] = []
        self.outputs: list[StepOutput] = []
        self._threads = [ThreadPoolExecutor(1) for _ in models]
        self._lead(models[0], self.runners)
        if self.caches[0] is not None:
            self.set_cache(cache_bytes // FRAME_BYTES)

    def set_cache(self, frames: int) -> None:
        moves = self.executor.set_cache(frames)
        for runner in self.runners:
            runner.move_cache(moves)

    def step(self, requests: Sequence[int], gate: Gate | None = None) -> StepResult:
        step = self.executor.plan(requests)
        if step is None:
            return self.executor.empty_result()
        self.steps.append(step)
        sent = travelled(step, StepInput)
        try:
            runs = [
                thread.submit(runner.run, sent, gate or OpenGate())
                for thread, runner in zip(self._threads, self.runners, strict=True)
            ]
            (output,) = [output for run in runs if (output := run.result()) is not None]
            self.outputs.append(output)
            return self.executor.finish(step, travelled(output, StepOutput))
        except Exception:
            self.executor.abandon(step)
            raise


def acting(models: Sequence[LoadedModel], tensor_parallel: int, pipeline_parallel: int) -> Sequence[LoadedModel]:
    """Whole models as the nodes of a group: each computes everything, and gives what its part would give."""
    for rank, model in enumerate(models):
        model.plan = dataclasses.replace(model.plan, shard=Shard.of_rank(rank, tensor_parallel, pipeline_parallel))
    return models


def travelled(message: Any, kind: Any) -> Any:
    return decode(b"".join(encode(message)), kind)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedModel], Path]:
    """Saves a model, with a tokenizer of bytes or an image processor, as a checkpoint folder."""

    def save(model: PreTrainedModel) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        if isinstance(model.config, ViTConfig):
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
        else:
            byte_tokenizer(VOCABULARY).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def load() -> Callable[..., LoadedModel]:
    """Loads a checkpoint folder the way a node does, into plain memory."""

    def load(folder: Path, *, device: str = "cpu", **settings: Any) -> LoadedModel:
        plan = plan_model(ModelConfig("model", str(folder), **{"dtype": "float32", **settings}))
        parameters = torch.empty(plan.image.nbytes, dtype=torch.uint8)
        plan.image.read_into(0, memoryview(parameters.numpy()))
        return load_model(plan, parameters.to(device))

    return load


@pytest.fixture(scope="session")
def family(checkpoint: Callable[[PreTrainedModel], Path]) -> Callable[[str], tuple[PreTrainedModel, Path]]:
    """A tiny model of an architecture of CONFIGS: transformers' own, in memory, and its checkpoint folder."""
    from transformers import AutoModelForCausalLM

    known: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in known:
            model = random_model(AutoModelForCausalLM, CONFIGS[name]())
            known[name] = (model, checkpoint(model))
        return known[name]

    return make


@pytest.fixture(scope="session")
def random_checkpoint(checkpoint: Callable[[PreTrainedModel], Path]) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """random_checkpoint(auto class, config): transformers' own model, in memory, and its checkpoint folder."""

    def make(auto_class: Any, config: PretrainedConfig) -> tuple[PreTrainedModel, Path]:
        model = random_model(auto_class, config)
        return model, checkpoint(model)

    return make


@pytest.fixture(scope="session")
def new_rig() -> Callable[[LoadedModel], Rig]:
    return Rig


@pytest.fixture
def rig(family: Callable[[str], tuple[PreTrainedModel, Path]], load: Callable[..., LoadedModel]) -> Callable[..., Rig]:
    def make(name: str = "llama", *, cache_bytes: int = 4 << 20, **settings: Any) -> Rig:
        return Rig(load(family(name)[1], **settings), cache_bytes)

    return make


@pytest.fixture
def group(
    family: Callable[[str], tuple[PreTrainedModel, Path]], load: Callable[..., LoadedModel]
) -> Callable[..., GroupRig]:
    """A group of as many stages as asked for, each of which has the whole model."""

    def make(name: str = "llama", stages: int = 2, *, cache_bytes: int = 4 << 20, **settings: Any) -> GroupRig:
        folder = family(name)[1]
        return GroupRig(acting([load(folder, **settings) for _ in range(stages)], 1, stages), cache_bytes)

    return make


@pytest.fixture(scope="session")
def new_group() -> Callable[..., GroupRig]:
    """new_group(models, tensor_parallel, pipeline_parallel): the same, of these models."""
    return lambda models, *parallel: GroupRig(acting(models, *parallel))


@pytest.fixture(scope="session")
def new_split_group() -> Callable[[Sequence[LoadedModel]], GroupRig]:
    """Of models that are parts of one."""
    return GroupRig


@pytest.fixture
def greedy() -> Callable[..., GenerateJob]:
    def job(prompt: Sequence[int], max_tokens: int = 8, **settings: Any) -> GenerateJob:
        return GenerateJob(tuple(prompt), SamplingParams(max_tokens, temperature=0.0, **settings))

    return job


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Twenty prompts of different lengths, from one token on."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 5, 7, 9, 11, 13, 15, 16, 17, 18, 23, 31, 32, 33, 47, 48, 64, 90]
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def reference(family: Callable[[str], tuple[PreTrainedModel, Path]]) -> Callable[..., list[int]]:
    """What transformers generates greedily, computed once for each prompt."""
    known: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def generate(name: str, prompt: Sequence[int], max_tokens: int = 8) -> list[int]:
        key = (name, tuple(prompt), max_tokens)
        if key not in known:
            ids = torch.tensor([prompt])
            model = family(name)[0]
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, use_cache=True
            )
            known[key] = out[0, len(prompt) :].tolist()
        return list(known[key])

    return generate


@contextmanager
def single_thread() -> Iterator[None]:
    """Small models are quicker without a second thread, the more so beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="session")
def smollm2(demo: DemoModels, load: Callable[..., LoadedModel]) -> tuple[Rig, list[list[int]], list[list[int]]]:
    """SmolLM2 in float32: a rig, twenty prompts, what transformers generates."""
    from transformers import AutoModelForCausalLM

    text = (
        "The history of the lighthouse begins long before electricity. Fires were lit on hilltops, later on towers, "
        "to guide ships past rocks and into harbours. With time the fires became lamps, and the lamps got lenses. "
    ) * 3
    rig = Rig(load(demo.smollm2, max_batch_size=20), cache_bytes=128 << 20)
    prompts = [rig.model.encode(text[: 8 + 11 * index]) for index in range(20)]
    model = AutoModelForCausalLM.from_pretrained(demo.smollm2, dtype=torch.float32).eval()
    expected = []
    with single_thread():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            expected.append(out[0, len(prompt) :].tolist())
    return rig, prompts, expected
