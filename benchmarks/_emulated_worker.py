"""A worker of bench_packing. Its agent, gradients and steps are real; its compute is emulated: it sleeps.

An iteration sleeps a third of its compute before backward, the rest in backward, in equal shares before each tensor's
gradient; its length varies from step to step. Gradients are the same memory at every step and are not copied, as if a
device had written them there.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from computron.parameter_service import SGD, AdamW, ParameterService

PROGRESS = struct.Struct("<qd")  # steps, and when the last one ended by time.monotonic(): a file of the job's
FORWARD = 1 / 3  # of the compute
RATE = 1e-4


class Task(msgspec.Struct, frozen=True):
    """compute: seconds. tensors: elements. jitter: standard deviation of the compute time, as a share of it."""

    master: str
    job: str
    optimizer: str
    tensors: tuple[int, ...]
    block_elements: int
    compute: float
    jitter: float
    loss_limit: float
    seed: int
    progress: str


class Backward(torch.autograd.Function):
    """Its derivative is there at a given moment."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor, begun: list[float], after: float) -> Tensor:
        ctx.given = gradient, begun, after
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, begun, after = ctx.given
        time.sleep(max(0.0, begun[0] + after - time.monotonic()))
        return gradient.detach(), None, None, None  # a tensor of its own: autograd takes it without a copy


def iterate(parameters: list[Tensor], gradients: list[Tensor], compute: float) -> None:
    """Emulated compute; the last tensor's gradient comes first."""
    begun = [time.monotonic()]
    time.sleep(compute * FORWARD)
    share = compute * (1 - FORWARD) / len(parameters)
    loss = parameters[0].new_zeros(())
    for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        after = compute * FORWARD + share * (len(parameters) - place)
        loss = loss + Backward.apply(parameter, gradient, begun, after)
    loss.backward()


def main() -> None:
    torch.set_num_threads(1)
    task = msgspec.json.decode(sys.argv[1], type=Task)
    random = torch.Generator().manual_seed(task.seed)
    parameters = [torch.nn.Parameter(torch.zeros(count)) for count in task.tensors]
    gradients = [torch.randn(count, generator=random) for count in task.tensors]
    named = [(str(place), parameter) for place, parameter in enumerate(parameters)]
    service = ParameterService(
        master=task.master, job=task.job, token=task.job, rank=0, loss_limit=task.loss_limit,
        block_elements=task.block_elements, snapshot_every=0,
    )  # fmt: skip
    if task.optimizer == "adamw":
        optimizer: AdamW | SGD = AdamW(named, lr=RATE, service=service)
    else:
        optimizer = SGD(named, lr=RATE, momentum=0.9, service=service)
    with Path(task.progress).open("r+b") as file, mmap.mmap(file.fileno(), PROGRESS.size) as progress, optimizer:
        while True:
            stretch = 1.0 + task.jitter * float(torch.randn((), generator=random))
            iterate(list(parameters), gradients, task.compute * max(0.0, stretch))
            optimizer.step()
            optimizer.zero_grad()
            PROGRESS.pack_into(progress, 0, optimizer.steps, time.monotonic())


if __name__ == "__main__":
    main()
