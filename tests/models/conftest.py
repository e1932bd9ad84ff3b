"""Small checkpoints with random weights, and a plain buffer that stands for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
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
from computron.models import ModelPlan
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
    "opt": lambda: OPTConfig(**_TEXT, ffn_dim=48),
    "opt-350m-like": lambda: OPTConfig(**_TEXT, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": lambda: GPT2Config(**_TEXT),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=8),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "gpt-neox": lambda: GPTNeoXConfig(**_MLP),
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4),
}
EMBED: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**_MLP),
    "roberta": lambda: RobertaConfig(**{**_MLP, "pad_token_id": 1}),
    "llama": GENERATE["llama"],
}
CLASSIFY: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**_MLP, num_labels=3),
    "llama": lambda: LlamaConfig(**_GROUPED, num_labels=3),
    "vit": lambda: ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=3,
    ),
}  # fmt: skip
CONFIGS = {"generate": GENERATE, "embed": EMBED, "classify": CLASSIFY}


def auto_class(task: str, architecture: str) -> Any:
    if task == "generate":
        return AutoModelForCausalLM
    if task == "embed":
        return AutoModel
    return AutoModelForImageClassification if architecture == "vit" else AutoModelForSequenceClassification


def save(folder: Path, task: str, architecture: str, dtype: torch.dtype, **options: Any) -> Path:
    """A checkpoint whose every tensor is random, those that would start as zeros or ones too."""
    config = CONFIGS[task][architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = auto_class(task, architecture).from_config(config)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        module.to(dtype).save_pretrained(folder, **options)
    if architecture == "vit":
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
def filling_gate() -> Callable[[ModelPlan], FillingGate]:
    return FillingGate


@pytest.fixture(scope="session")
def auto() -> Callable[[str, str], Any]:
    return auto_class
