"""A worker of bench_faults: waits, imports done, for a line with its rank, then trains until the step it is told.

Its batches depend on the step and the rank alone: who takes a step again, or takes over from a dead worker, computes
the same gradients, and the parameters at the end are those of a run without faults.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from computron.parameter_service import AdamW, ParameterService

WORKERS = 2
WIDTH, CLASSES, BATCH = 128, 10, 16
PROGRESS = struct.Struct("<qqd")  # steps, lost steps, loss: a file of each worker's own
TARGET = struct.Struct("<q")  # the last step: a file that all read
NEVER = 1 << 62
RATE = 1e-3


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A task that can be learned: the class is where a fixed projection of the input is largest."""
    generator = torch.Generator().manual_seed(step * WORKERS + rank)
    inputs = torch.randn(BATCH, 32, generator=generator)
    projection = torch.randn(32, CLASSES, generator=torch.Generator().manual_seed(7))
    return inputs, (inputs @ projection).argmax(-1)


def loss_of(network: nn.Module, step: int, rank: int) -> Tensor:
    inputs, classes = batch(step, rank)
    return nn.functional.cross_entropy(network(inputs), classes)


def reference(steps: int) -> tuple[nn.Module, float]:
    """One process, torch's own optimizer, gradients summed in order of rank; and the last step's loss of rank 0."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, fused=True)
    last = 0.0
    for step in range(1, steps + 1):
        totals: list[Tensor] = []
        for rank in range(WORKERS):
            optimizer.zero_grad()
            loss = loss_of(network, step, rank)
            loss.backward()
            last = float(loss.detach()) if rank == 0 else last
            mine = [p.grad for p in network.parameters() if p.grad is not None]
            totals = [a + b for a, b in zip(totals, mine, strict=True)] if totals else mine
        for parameter, total in zip(network.parameters(), totals, strict=True):
            parameter.grad = total / WORKERS
        optimizer.step()
    return network, last


@contextmanager
def mapped(path: Path, size: int) -> Iterator[mmap.mmap]:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as found:
        yield found


def main() -> None:
    torch.set_num_threads(1)
    url, where, every, pause, least = sys.argv[1:6]
    folder = Path(where)
    torch.optim.AdamW([torch.empty(1)])  # torch imports more when the first optimizer is made
    print("ready", flush=True)
    rank = int(input())
    network = model()
    service = ParameterService(
        master=url, job="faults", token="faults", rank=rank, workers=WORKERS, min_workers=int(least),
        snapshot_every=int(every), block_elements=2048,
    )  # fmt: skip
    with (
        mapped(folder / f"progress-{rank}", PROGRESS.size) as progress,
        mapped(folder / "target", TARGET.size) as target,
        AdamW(network.named_parameters(), lr=RATE, service=service) as optimizer,
    ):
        while optimizer.steps < TARGET.unpack_from(target)[0]:
            loss = loss_of(network, optimizer.steps + 1, rank)
            optimizer.zero_grad()
            loss.backward()
            time.sleep(float(pause))
            optimizer.step()
            PROGRESS.pack_into(progress, 0, optimizer.steps, optimizer.lost_steps, float(loss.detach()))
        torch.save(network.state_dict(), folder / f"parameters-{rank}.pt")


if __name__ == "__main__":
    main()
