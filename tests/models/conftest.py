"""Small checkpoints with random weights, a buffer that stands for the device, and threads that stand for nodes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ApertusConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    DeiTConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from computron.config import ModelConfig
from computron.models import LoadedModel, ModelPlan, Shard, load_model, plan_model
from computron.models.byte_tokenizer import byte_tokenizer

VOCABULARY = 300
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MLP = {**_TEXT, "intermediate_size": 48}
_GROUPED = {**_MLP, "num_key_value_heads": 2}

GENERATE: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "llama-tied": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama-odd": lambda: LlamaConfig(
        **{**_MLP, "vocab_size": 301, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6},
        num_key_value_heads=3,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "opt": lambda: OPTConfig(**_TEXT, ffn_dim=48),
    "opt-350m-like": lambda: OPTConfig(**_TEXT, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": lambda: GPT2Config(**_TEXT),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=8),
    "apertus": lambda: ApertusConfig(**_GROUPED),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "gpt-neox": lambda: GPTNeoXConfig(**_MLP),
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4),
}
EMBED: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**_MLP),
    "roberta": lambda: RobertaConfig(**{**_MLP, "pad_token_id": 1}),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "electra": lambda: ElectraConfig(**_MLP, embedding_size=16),
    "modernbert": lambda: ModernBertConfig(**_MLP),
    "mpnet": lambda: MPNetConfig(**{**_MLP, "pad_token_id": 1}),
    "llama": GENERATE["llama"],
}
CLASSIFY: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**_MLP, num_labels=3),
    "llama": lambda: LlamaConfig(**_GROUPED, num_labels=3),
    "vit": lambda: ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=3,
    ),
    "deit": lambda: DeiTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=3, architectures=["DeiTForImageClassification"],
    ),
}  # fmt: skip
IMAGES = ("vit", "deit")
CONFIGS = {"generate": GENERATE, "embed": EMBED, "classify": CLASSIFY}


def auto_class(task: str, architecture: str) -> Any:
    if task == "generate":
        return AutoModelForCausalLM
    if task == "embed":
        return AutoModel
    return AutoModelForImageClassification if architecture in IMAGES else AutoModelForSequenceClassification


def save(folder: Path, task: str, architecture: str, dtype: torch.dtype, **options: Any) -> Path:
    """A checkpoint whose every tensor is random, those that would start as zeros or ones too."""
    config = CONFIGS[task][architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = auto_class(task, architecture).from_config(config)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        module.to(dtype).save_pretrained(folder, **options)
    if architecture in IMAGES:
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        byte_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def fill(plan: ModelPlan, step: int = 10_007) -> torch.Tensor:
    """The image as the device would hold it, read in odd pieces."""
    buffer = torch.full((plan.image.nbytes,), 0xFF, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    for offset in range(0, plan.image.nbytes, step):
        plan.image.read_into(offset, view[offset : offset + step])
    return buffer


class FillingGate:
    """Closed. A wait for a segment brings its bytes, so that whatever is read without waiting is NaN.

    Works on a buffer of its own, `parameters`; `order` holds the segments in the order of their waits.
    """

    is_open = False

    def __init__(self, plan: ModelPlan) -> None:
        self._image = fill(plan)
        self._ends = plan.image.segment_ends
        self.parameters = torch.full_like(self._image, 0xFF)
        self.order: list[int] = []
        self._lock = threading.Lock()

    def wait(self, segment: int, stream: int = 0) -> None:
        with self._lock:
            self.order.append(segment)
            begin, end = (self._ends[segment - 1] if segment else 0), self._ends[segment]
            self.parameters[begin:end] = self._image[begin:end]


WAIT = 20  # seconds after which a rank that waits for another one fails


class Stage:
    """What the ranks of one stage put together."""

    def __init__(self, nodes: int) -> None:
        self.barrier = threading.Barrier(nodes)
        self.parts: list[Any] = [None] * nodes

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = tensor
        self.barrier.wait(WAIT)
        parts = list(self.parts)
        self.barrier.wait(WAIT)
        return parts


class ThreadCommunicator:
    """`calls`: what was asked of it, in order."""

    def __init__(self, shard: Shard, stages: Sequence[Stage], links: Sequence[queue.Queue[torch.Tensor]]) -> None:
        self._shard = shard
        self._stage = stages[shard.stage]
        self._links = links
        self.calls: list[str] = []

    def all_reduce(self, tensor):
        self.calls.append("all_reduce")
        first, *others = self._stage.exchange(self._shard.tensor_rank, tensor.clone())
        return sum(others, start=first)

    def all_gather(self, tensor, sizes):
        self.calls.append("all_gather")
        parts = self._stage.exchange(self._shard.tensor_rank, tensor.clone())
        assert [part.shape[-1] for part in parts] == list(sizes)
        return torch.cat(parts, -1)

    def send(self, tensor):
        self.calls.append("send")
        assert tensor.is_contiguous()
        self._links[self._shard.rank + self._shard.tensor_parallel].put(tensor.clone())

    def receive(self, like):
        self.calls.append("receive")
        tensor = self._links[self._shard.rank].get(timeout=WAIT)
        assert (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device)
        return tensor

    def abort(self):
        self._stage.barrier.abort()


class Group:
    """All parts of one model: a thread for each rank, which runs its own part."""

    def __init__(
        self, plans: Callable[[ModelConfig, Shard], ModelPlan], config: ModelConfig, tensor_parallel: int,
        pipeline_parallel: int,
    ) -> None:  # fmt: skip
        world = tensor_parallel * pipeline_parallel
        self.shards = [Shard.of_rank(rank, tensor_parallel, pipeline_parallel) for rank in range(world)]
        self.plans = [plans(config, shard) for shard in self.shards]
        stages = [Stage(tensor_parallel) for _ in range(pipeline_parallel)]
        links: list[queue.Queue[torch.Tensor]] = [queue.Queue() for _ in range(world)]
        self.communicators = [ThreadCommunicator(shard, stages, links) for shard in self.shards]
        self.models = [
            load_model(plan, fill(plan), communicator=communicator)
            for plan, communicator in zip(self.plans, self.communicators, strict=True)
        ]

    def run(self, forward: Callable[[LoadedModel, int], Any]) -> list[Any]:
        """`forward(model, rank)` on every rank at once; what each gave."""
        outputs: list[Any] = [None] * len(self.models)
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                with torch.inference_mode():
                    outputs[rank] = forward(self.models[rank], rank)
            except BaseException as error:
                errors.append(error)
                for communicator in self.communicators:
                    communicator.abort()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(self.models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return outputs

    def result(self, **given: torch.Tensor) -> torch.Tensor:
        """Logits or hidden states of the node that gives the result; all nodes of its stage give the same."""
        outputs = self.run(lambda model, _: model.forward(**given))
        for shard, output in zip(self.shards, outputs, strict=True):
            assert (output is not None) == shard.last
        results = [output["logits"] if "logits" in output else output["last_hidden_state"] for output in outputs
                   if output is not None]  # fmt: skip
        assert all(torch.equal(results[0], other) for other in results)
        return results[0]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(task, architecture, dtype) -> folder; made once."""
    folders: dict[tuple[str, str, torch.dtype], Path] = {}

    def get(task: str, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (task, architecture, dtype)
        if key not in folders:
            folders[key] = save(tmp_path_factory.mktemp(architecture), task, architecture, dtype)
        return folders[key]

    return get


@pytest.fixture
def new_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """new_checkpoint(task, architecture, dtype, **options of save_pretrained) -> a folder that the test may change."""

    def make(task: str, architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        return save(tmp_path / "checkpoint", task, architecture, dtype, **options)

    return make


@pytest.fixture
def config() -> Callable[..., ModelConfig]:
    def make(source: Path | str = "", **fields: Any) -> ModelConfig:
        return ModelConfig(**{"id": "m", "source": str(source), **fields})

    return make


@pytest.fixture(scope="session")
def filled() -> Callable[..., torch.Tensor]:
    return fill


@pytest.fixture(scope="session")
def new_group() -> Callable[..., Group]:
    """new_group(config, tensor_parallel, pipeline_parallel); plans are made once."""
    known: dict[tuple[Any, ...], ModelPlan] = {}

    def plan(config: ModelConfig, shard: Shard) -> ModelPlan:
        key = (config.source, config.task, config.dtype, shard)
        if key not in known:
            known[key] = plan_model(config, shard)
        return known[key]

    return lambda *arguments: Group(plan, *arguments)


@pytest.fixture(scope="session")
def filling_gate() -> Callable[[ModelPlan], FillingGate]:
    return FillingGate


@pytest.fixture(scope="session")
def auto() -> Callable[[str, str], Any]:
    return auto_class
