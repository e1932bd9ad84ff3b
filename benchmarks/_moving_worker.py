"""Workers of bench_migration, each in a process of its own.

    python _moving_worker.py emulated URL FOLDER ELEMENTS    through the Parameter Service
    python _moving_worker.py plain FOLDER ELEMENTS           torch's own optimizer; goes on from FOLDER/checkpoint
    python _moving_worker.py learn URL FOLDER JOB RANK       a small real job, exactly as _fault_worker's

The first two emulate a job: its compute is a sleep of COMPUTE seconds, spread over the layers of the backward pass,
each of which then gives its whole gradient. They append the moment at which each step ended, by time.monotonic(), to
FOLDER/steps, and end when FOLDER/stop is there; `plain` writes its checkpoint before that.
"""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _fault_worker import RATE, TARGET, WORKERS, loss_of, mapped, model
from torch import Tensor

from computron.parameter_service import AdamW, ParameterService

COMPUTE = 0.1  # seconds of an emulated step
LAYER = 4_000_000  # elements of each of an emulated job's tensors
MOMENT = struct.Struct("<d")
JOB = "emulated"


class Layer(torch.autograd.Function):
    """Computes nothing, for some time, and has a gradient that was there before."""

    @staticmethod
    def forward(context: Any, value: Tensor, weight: Tensor, gradient: Tensor, seconds: float) -> Tensor:
        context.gradient, context.seconds = gradient, seconds
        return value.clone()

    @staticmethod
    def backward(context: Any, *values: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(context.seconds)
        return values[0], context.gradient, None, None


class Emulated:
    """A job of so many fp32 elements."""

    def __init__(self, elements: int) -> None:
        count = max(1, elements // LAYER)
        generator = torch.Generator().manual_seed(1)
        size = elements // count
        self.weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for _ in range(count)]
        self._gradients = [torch.randn(size, generator=generator) for _ in range(count)]

    def backward(self) -> None:
        value = torch.zeros((), requires_grad=True)
        for weight, gradient in zip(self.weights, self._gradients, strict=True):
            value = Layer.apply(value, weight, gradient, COMPUTE / len(self.weights))
        value.backward()  # type: ignore[no-untyped-call]


def train(job: Emulated, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    with (folder / "steps").open("ab", buffering=0) as steps:
        while not (folder / "stop").exists():
            job.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.write(MOMENT.pack(time.monotonic()))


def emulated(url: str, folder: Path, elements: int) -> None:
    job = Emulated(elements)
    service = ParameterService(url, JOB, "secret", 0, snapshot_every=0)
    with AdamW(job.weights, lr=1e-4, service=service) as optimizer:
        train(job, optimizer, folder)


def plain(folder: Path, elements: int) -> None:
    job = Emulated(elements)
    optimizer = torch.optim.AdamW(job.weights, lr=1e-4, fused=True)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        loaded = torch.load(checkpoint)
        with torch.no_grad():
            for weight, value in zip(job.weights, loaded["weights"], strict=True):
                weight.copy_(value)
        optimizer.load_state_dict(loaded["optimizer"])
    train(job, optimizer, folder)
    weights = [weight.detach() for weight in job.weights]
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, checkpoint)


def learn(url: str, folder: Path, job: str, rank: int) -> None:
    """Until the step in FOLDER/JOB.target. FOLDER/JOB.RANK has its step, and in the end FOLDER/JOB.RANK.pt what it has
    learned.
    """
    network = model()
    service = ParameterService(
        url, job, "secret", rank, WORKERS, snapshot_every=0, block_elements=2048, shared_memory=job != "tcp"
    )
    with (
        mapped(folder / f"{job}.target", TARGET.size) as target,
        mapped(folder / f"{job}.{rank}", TARGET.size) as steps,
        AdamW(network.named_parameters(), lr=RATE, service=service) as optimizer,
    ):
        while optimizer.steps < TARGET.unpack_from(target)[0]:
            loss = loss_of(network, optimizer.steps + 1, rank)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            TARGET.pack_into(steps, 0, optimizer.steps)
        torch.save(network.state_dict(), folder / f"{job}.{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["emulated", url, folder, elements]:
            emulated(url, Path(folder), int(elements))
        case ["plain", folder, elements]:
            plain(Path(folder), int(elements))
        case ["learn", url, folder, job, rank]:
            learn(url, Path(folder), job, int(rank))
