"""A worker that trains the example's language model through the Parameter Service and notes what each step makes of it.

    python learner.py URL FOLDER KIND RANK

It goes on until the step in FOLDER/KIND.last, and writes a line `step digest` a step to FOLDER/KIND.RANK.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from computron.parameter_service import SGD, AdamW, ParameterService

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_language_model.py"
WORKERS = 2
LENGTH = 32  # of the one sequence a worker and step
SETTINGS = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, "adamw": {"lr": 1e-3}}
OPTIMIZERS = {"sgd": (SGD, torch.optim.SGD), "adamw": (AdamW, torch.optim.AdamW)}


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_language_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Learner:
    """The model, from the same beginning everywhere, and what its workers learn from."""

    def __init__(self) -> None:
        found = example()
        torch.manual_seed(0)
        self.model: nn.Module = found.LanguageModel()
        self._text = found.Text(None)

    def loss(self, step: int, rank: int) -> Tensor:
        loss: Tensor = self.model.loss(self._text.batch(step, rank)[:1, : LENGTH + 1])  # type: ignore[operator]
        return loss

    def digest(self) -> str:
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().numpy().data)
        return digest.hexdigest()


def reference(kind: str, steps: int) -> Iterator[str]:
    """One process, torch's own optimizer, gradients summed in order of rank: a line a step."""
    learner = Learner()
    optimizer = OPTIMIZERS[kind][1](learner.model.parameters(), fused=True, **SETTINGS[kind])
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for rank in range(WORKERS):
            learner.loss(step, rank).backward()
        for parameter in learner.model.parameters():
            assert parameter.grad is not None
            parameter.grad /= WORKERS
        optimizer.step()
        yield f"{step} {learner.digest()}"


def learn(url: str, folder: Path, kind: str, rank: int) -> None:
    learner = Learner()
    service = ParameterService(url, kind, "secret", rank, WORKERS, block_elements=1 << 18)
    with (
        (folder / f"{kind}.{rank}").open("w", buffering=1) as lines,
        OPTIMIZERS[kind][0](learner.model.named_parameters(), service=service, **SETTINGS[kind]) as optimizer,
    ):
        for step in itertools.count(1):
            optimizer.zero_grad()
            learner.loss(step, rank).backward()
            optimizer.step()
            print(step, learner.digest(), file=lines)
            if (folder / f"{kind}.last").read_text() == str(step):
                return


if __name__ == "__main__":
    torch.set_num_threads(1)
    learn(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
