"""Small models that bench_aggregation trains. Each gives the loss of any step's batch of any worker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_language_model import SYMBOLS, LanguageModel, Text, manual

IMAGES, SIDE, CLASSES = 32, 32, 10  # of a batch; pixels; kinds of images
SENTENCES, TOKENS = 8, 32  # of a batch; of a sentence
TEMPERATURE = 0.05


def generator(step: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(step * 65536 + rank)


class Convolutions(nn.Module):
    """Random images [IMAGES, 3, SIDE, SIDE], each class around a pattern of its own."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 32, 64, 128, 256)
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.GroupNorm(8, outs), nn.ReLU(), nn.MaxPool2d(2))
                for ins, outs in pairwise(channels)
            )
        )
        self.head = nn.Linear(channels[-1] * (SIDE // 16) ** 2, CLASSES)
        self.register_buffer("patterns", torch.randn(CLASSES, 3, SIDE, SIDE))

    def loss(self, step: int, rank: int) -> Tensor:
        source = generator(step, rank)
        classes = torch.randint(CLASSES, (IMAGES,), generator=source)
        images = self.patterns[classes] + torch.randn(IMAGES, 3, SIDE, SIDE, generator=source)
        return F.cross_entropy(self.head(self.features(images).flatten(1)), classes)


class Recurrent(nn.Module):
    """An LSTM that predicts the next byte of a text."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.text = Text(None)
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, SYMBOLS)

    def loss(self, step: int, rank: int) -> Tensor:
        sequences = self.text.batch(step, rank)
        states, _ = self.layers(self.embedding(sequences[:, :-1]))
        return F.cross_entropy(self.head(states).flatten(0, 1), sequences[:, 1:].flatten())


class Transformer(nn.Module):
    """That of examples/train_language_model.py."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Text(None)
        self.model = LanguageModel()

    def loss(self, step: int, rank: int) -> Tensor:
        return self.model.loss(self.text.batch(step, rank))


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2, fine-tuned: a line of a text is to be nearest to itself when a quarter of its words is hidden.
    Its weights are fetched at the first use.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        from computron.models.demo import demo_models

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = demo_models().minilm
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
        self.encoder.eval()  # without dropout
        lines = [line for line in manual().decode().splitlines() if len(line.split()) >= 6]
        tokens = AutoTokenizer.from_pretrained(folder)
        coded = tokens(lines, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        self.lines, self.present = coded["input_ids"], coded["attention_mask"]
        self.hidden = tokens.mask_token_id

    def loss(self, step: int, rank: int) -> Tensor:
        source = generator(step, rank)
        chosen = torch.randint(len(self.lines), (SENTENCES,), generator=source)
        lines, present = self.lines[chosen], self.present[chosen]
        hide = torch.rand(lines.shape, generator=source) < 0.25
        hide[:, 0] = False
        vectors = self._encode(torch.cat([lines, lines.masked_fill(hide, self.hidden)]), present.repeat(2, 1))
        likeness = vectors[:SENTENCES] @ vectors[SENTENCES:].T / TEMPERATURE
        return F.cross_entropy(likeness, torch.arange(SENTENCES))

    def _encode(self, lines: Tensor, present: Tensor) -> Tensor:
        states = self.encoder(input_ids=lines, attention_mask=present).last_hidden_state
        weights = present[..., None].to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


@dataclass(frozen=True)
class Training:
    """optimizer: the class's name in torch.optim and in the Parameter Service, with its settings."""

    model: Callable[[], Any]
    optimizer: str
    settings: dict[str, float] = field(default_factory=dict)

    def build(self) -> Any:
        torch.manual_seed(0)
        return self.model()

    def local(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(parameters, fused=True, **self.settings)


TRAININGS = {
    "cnn": Training(Convolutions, "SGD", {"lr": 0.01, "momentum": 0.9}),
    "lstm": Training(Recurrent, "Adam", {"lr": 1e-3}),
    "transformer": Training(Transformer, "AdamW", {"lr": 1e-3}),
    "minilm": Training(SentenceEncoder, "AdamW", {"lr": 2e-5}),
}
