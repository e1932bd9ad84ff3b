"""A worker of bench_aggregation, in a process of its own. Prints one JSON object."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from computron.parameter_service import AdamW, ParameterService
from computron.parameter_service.agent.staging import Staging
from computron.parameter_service.layout import Layout, TensorSpec

SIDE = 1000  # of the square matrices that the parameters are
WIDTH, LAYERS = 64, 12  # of a transformer with many small tensors
LAYER = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH)]
SHAPES = {"small": [(8, 8), (8,)], "many": [*LAYER, *[(WIDTH,)] * 6] * LAYERS}
WARM_UP = 3
SETTLED = 8.0  # seconds after which memory has got its huge pages
THREADS = 2  # that copy gradients: the push thread, and the training thread helps it


def overhead(what: str, master: str, elements: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of `step()`: of this agent, and of torch's fused optimizer, in turn; and to copy the gradients once."""
    shapes = SHAPES.get(what) or [(SIDE, SIDE)] * (elements // SIDE**2)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    gradients = [torch.randn(shape) for shape in shapes]
    service = ParameterService(master=master, job=what, token="overhead", rank=0, snapshot_every=0)
    taken: dict[str, list[float]] = {"service": [], "torch": [], "copy": []}
    copies = [torch.zeros(shape) for shape in shapes]
    other = ThreadPoolExecutor(THREADS - 1)
    with AdamW(ours, lr=1e-4, service=service) as agent:
        local = torch.optim.AdamW(theirs, lr=1e-4, fused=True)
        measured = time.monotonic() + SETTLED
        while len(taken["copy"]) < rounds:
            if time.monotonic() < measured:
                for seconds in taken.values():
                    seconds.clear()
            for name, parameters, optimizer in (("service", ours, agent), ("torch", theirs, local)):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                start = time.perf_counter()
                optimizer.step()
                taken[name].append(time.perf_counter() - start)
                optimizer.zero_grad()
            taken["copy"].append(seconds_to_copy([gradient.clone() for gradient in gradients], copies, other))
        other.shutdown()
        same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if not same:
        raise RuntimeError("the service's parameters are not those of torch")
    return taken


def seconds_to_copy(sources: list[Tensor], targets: list[Tensor], other: ThreadPoolExecutor) -> float:
    """By THREADS threads."""

    def copy(first: int) -> None:
        for number in range(first, len(sources), THREADS):
            targets[number].copy_(sources[number])

    start = time.perf_counter()
    others = other.submit(copy, 1)
    copy(0)
    others.result()
    return time.perf_counter() - start


def shared(elements: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to stage gradients in shared memory, and to memcpy them to other memory."""
    tensors = [TensorSpec(str(number), (SIDE, SIDE), "float32", 0) for number in range(elements // SIDE**2)]
    gradients = [torch.randn(SIDE, SIDE) for _ in tensors]
    copies = [torch.zeros(SIDE, SIDE) for _ in tensors]
    idle = threading.Event()
    other = ThreadPoolExecutor(THREADS - 1)

    def staged(blocks: list[int], final: bool) -> None: ...

    def failed(error: BaseException) -> None:
        raise error

    layout = Layout(tensors)
    staging = Staging(layout, "float32", staged=staged, may_write=lambda block: True, idle=idle.set, failed=failed)
    taken: dict[str, list[float]] = {"service": [], "memcpy": []}
    for _ in range(WARM_UP + rounds):
        staging.begin()
        idle.clear()
        start = time.perf_counter()
        staging.finish(list(enumerate(gradients)))
        idle.wait()
        taken["service"].append(time.perf_counter() - start)
        taken["memcpy"].append(seconds_to_copy(gradients, copies, other))
    other.shutdown()
    staging.close()
    return {name: seconds[WARM_UP:] for name, seconds in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    what, rounds, elements = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    found: Any = shared(elements, rounds) if what == "shared" else overhead(what, sys.argv[4], elements, rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
