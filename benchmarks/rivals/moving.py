"""What the rivals of our own making compute with: transformers' modules, moved whole between host and device.

The compute is that of transformers, as in the systems that people build; only who holds which model differs.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """models: checkpoint folders by name. room: models that the device may hold at once."""

    port: int
    task: str
    models: Mapping[str, str]
    room: int
    dtype: str
    threads: int
    max_batch_size: int


def settings_from_arguments() -> Settings:
    """The JSON object that is this program's only argument."""
    return Settings(**json.loads(sys.argv[1]))


class Model(ABC):
    """A module whose parameters are in host memory, or on the device while it is loaded.

    On a machine without a GPU, `.to("cpu")` does nothing: the module is there already. What `.to(device)` costs where
    the device is not the host is memory on it, taken parameter by parameter, and a copy of each into it, and this is
    what `to_device` does, with all of torch's threads. `to_host` frees that memory and points back at the host's copy:
    `.to("cpu")` would copy the unchanged parameters back, which nobody needs.
    """

    def __init__(self, module: nn.Module, folder: str) -> None:
        self._module = module.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._parameters = list(module.parameters())
        self._host = [parameter.data for parameter in self._parameters]

    @property
    def nbytes(self) -> int:
        """Of the parameters; a tied one counts once."""
        return sum(tensor.nbytes for tensor in self._host)

    def to_device(self) -> None:
        for parameter, tensor in zip(self._parameters, self._host, strict=True):
            parameter.data = tensor.clone()

    def to_host(self) -> None:
        for parameter, tensor in zip(self._parameters, self._host, strict=True):
            parameter.data = tensor

    @abstractmethod
    def answers(self, bodies: Sequence[Body]) -> list[dict[str, Any]]:
        """One padded batch of requests, answered in OpenAI's shape."""


class Generator(Model):
    """Greedy completions. All of a batch run for the longest `max_tokens`; each is cut to its own."""

    def answers(self, bodies: Sequence[Body]) -> list[dict[str, Any]]:
        prompts, limits = [body["prompt"] for body in bodies], [body["max_tokens"] for body in bodies]
        batch = self._tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            tokens = self._module.generate(
                **batch, max_new_tokens=max(limits), do_sample=False, pad_token_id=self._tokenizer.pad_token_id
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        return [self._completion(row[:limit].tolist()) for row, limit in zip(new, limits, strict=True)]

    def _completion(self, tokens: Sequence[int]) -> dict[str, Any]:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return {
            "object": "text_completion",
            "choices": [{"index": 0, "text": text, "finish_reason": "length"}],
            "usage": {"completion_tokens": len(tokens)},
        }


class Embedder(Model):
    """The mean of the last hidden states, normalised, as all-MiniLM-L6-v2 wants it."""

    def answers(self, bodies: Sequence[Body]) -> list[dict[str, Any]]:
        batch = self._tokenizer([body["input"] for body in bodies], return_tensors="pt", padding=True)
        with torch.inference_mode():
            hidden = self._module(**batch).last_hidden_state
            vectors = mean_of_tokens(hidden, batch["attention_mask"])
        return [{"object": "list", "data": [{"index": 0, "embedding": vector}]} for vector in vectors.tolist()]


def mean_of_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, width) and (batch, tokens) to (batch, width) of length 1."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def load(settings: Settings) -> dict[str, Model]:
    if settings.task == "generate":
        return {
            name: Generator(AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype), folder)
            for name, folder in settings.models.items()
        }
    return {
        name: Embedder(AutoModel.from_pretrained(folder, dtype=settings.dtype), folder)
        for name, folder in settings.models.items()
    }
