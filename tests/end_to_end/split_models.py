"""Custom models that split themselves, for the nodes of `groups` to import."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from computron.models import Communicator, Shard
from computron.node.group_steps import STRAGGLERS

WAIT = 20.0  # seconds


class SplitLinear(nn.Module):
    """Rows of a square matrix; the nodes of a stage have one part each."""

    def __init__(self, width: int, seed: int, shard: Shard) -> None:
        super().__init__()
        whole = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        self.sizes = [len(part) for part in whole.tensor_split(shard.tensor_parallel)]
        self.weight = nn.Parameter(whole.tensor_split(shard.tensor_parallel)[shard.tensor_rank].clone())
        self.communicator: Communicator

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        own = given @ self.weight.T
        return self.communicator.all_gather(own, self.sizes) if len(self.sizes) > 1 else own


class SplitMLP(nn.Module):
    """Its layers run stage after stage."""

    def __init__(self, width: int, layers: int, shard: Shard) -> None:
        super().__init__()
        numbers = torch.arange(layers).tensor_split(shard.pipeline_parallel)[shard.stage]
        self.layers = nn.ModuleList(SplitLinear(width, number, shard) for number in numbers.tolist())
        self.shard = shard
        self.communicator: Communicator

    def set_communicator(self, communicator: Communicator) -> None:
        self.communicator = communicator
        for layer in self.layers:
            layer.communicator = communicator  # type: ignore[assignment]

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = given if self.shard.first else self.communicator.receive(given)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        if not self.shard.last:
            self.communicator.send(hidden)
        return hidden


def make_mlp(width: int, layers: int, shard: Shard = Shard()) -> nn.Module:  # noqa: B008 -- frozen
    return SplitMLP(width, layers, shard)


class Meeting(nn.Module):
    """Two of these end only if the second stage of each runs while, or after, the first stage of the other does."""

    def __init__(self, folder: Path, own: str, other: str, shard: Shard) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._own, self._other, self._shard = folder / own, folder / other, shard
        self.communicator: Communicator

    def set_communicator(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self._shard.first:
            self._own.touch()
            result = given * self.weight
            self.communicator.send(result)
            return result
        result = self.communicator.receive(given)
        deadline = time.monotonic() + WAIT
        while not self._other.exists():
            assert time.monotonic() < deadline, f"{self._other.name} has not begun"
            time.sleep(0.005)
        return result


def make_meeting(folder: str, own: str, other: str, shard: Shard) -> nn.Module:
    return Meeting(Path(folder), own, other, shard)


class Deadly(nn.Module):
    """Gives its input back, but for negative numbers, of which its second node dies."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._rank = shard.rank

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self._rank == 1 and (given < 0).any():
            os._exit(9)
        return given * self.weight


def make_deadly(shard: Shard) -> nn.Module:
    return Deadly(shard)


class Relay(nn.Module):
    """Gives its input back, a number. Its second stage ends with one only once its first one has begun with another, if
    any of the `total` is left. With negative numbers it raises then, before it has received what was sent for them.
    """

    def __init__(self, folder: Path, total: int, shard: Shard) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._folder, self._total, self._shard = folder, total, shard
        self._seen = 0
        self.communicator: Communicator

    def set_communicator(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        number = int(given[0].item())
        if self._shard.first:
            (self._folder / f"begun-{number}").touch()
            result = given * self.weight
            self.communicator.send(result)
            return result
        self._seen = min(self._seen + 1, self._total)
        if number >= 0:
            given = self.communicator.receive(given)
        deadline = time.monotonic() + WAIT
        while len(list(self._folder.glob("begun-*"))) < min(self._seen + 1, self._total):
            assert time.monotonic() < deadline, "no other has begun"
            time.sleep(0.005)
        if number < 0:
            raise ValueError(f"{number} is negative")
        return given


def make_relay(folder: str, total: int, shard: Shard) -> nn.Module:
    return Relay(Path(folder), total, shard)


class Patient(nn.Module):
    """Gives its input back, a number. Its first stage raises for negative ones; its last one ends with another only
    once that has happened, the first time some time later. It notes in `passed` what it ends with.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._folder, self._shard = folder, shard
        self.communicator: Communicator

    def set_communicator(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        number = int(given[0].item())
        raised = self._folder / "raised"
        if self._shard.first:
            if number < 0:
                raised.touch()
                raise ValueError(f"{number} is negative")
            result = given * self.weight
            self.communicator.send(result)
            return result
        given = self.communicator.receive(given)
        (self._folder / "reached").touch()
        deadline = time.monotonic() + WAIT
        while not raised.exists():
            assert time.monotonic() < deadline, "nothing has failed"
            time.sleep(0.005)
        passed = self._folder / "passed"
        if not passed.exists():
            time.sleep(1.5 * STRAGGLERS)
        with passed.open("a") as file:
            file.write(f"{number} ")
        return given


def make_patient(folder: str, shard: Shard) -> nn.Module:
    return Patient(Path(folder), shard)
