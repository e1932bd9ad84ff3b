"""A worker of bench_aggregation's trainings. Takes orders, one JSON object a line, and answers each with one.

Arguments: rank, workers, and a file through which they find each other for gloo.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from _service import cpu_seconds
from _training_models import TRAININGS, Training
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import computron.parameter_service as parameter_service
from computron.parameter_service import ParameterService

SHAPE, TENSORS = (1000, 1000), 4  # of the job with emulated compute
NEAR = 1e-4  # DistributedDataParallel divides before it adds up


@dataclass(frozen=True)
class Steps:
    """warm_up: not measured; the parameters are compared after them. servers: whose CPU time counts too."""

    warm_up: int
    measured: int
    servers: tuple[int, ...]

    def take(self, step: Callable[[int], None], check: Callable[[], None]) -> dict[str, Any]:
        seconds = []
        for number in range(1, self.warm_up + self.measured + 1):
            if number == self.warm_up + 1:
                cpu = self.cpu()
            seconds.append(_seconds(step, number))
            if number == self.warm_up:
                check()
        return {"seconds": seconds[self.warm_up :], "cpu": self.cpu() - cpu}

    def cpu(self) -> float:
        return time.process_time() + sum(cpu_seconds(pid) for pid in self.servers)


class _Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, step: int, rank: int) -> Tensor:
        loss: Tensor = self.model.loss(step, rank)
        return loss


class Worker:
    def __init__(self, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self._open = ExitStack()
        self._references: dict[str, list[Tensor]] = {}

    def reference(self, model: str, steps: int) -> dict[str, Any]:
        """The parameters that one process comes to with the gradients of all workers, added up in their order."""
        training = TRAININGS[model]
        network = training.build()
        optimizer = training.local(network.parameters())
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            for rank in range(self.workers):
                network.loss(step, rank).backward()
            for parameter in network.parameters():
                parameter.grad = parameter.grad / self.workers
            optimizer.step()
        self._references[model] = [p.detach().clone() for p in network.parameters()]
        return {}

    def alone(self, model: str, steps: Steps) -> dict[str, Any]:
        training = TRAININGS[model]
        network = training.build()
        return self._train(network.loss, training.local(network.parameters()), steps, lambda: None)

    def ddp(self, model: str, steps: Steps) -> dict[str, Any]:
        training = TRAININGS[model]
        network = training.build()
        optimizer = training.local(network.parameters())
        check = self._checks(model, network, lambda a, b: torch.allclose(a, b, rtol=NEAR, atol=NEAR))
        return self._train(DistributedDataParallel(_Loss(network)), optimizer, steps, check)

    def service(self, model: str, steps: Steps, master: str, stay: bool) -> dict[str, Any]:
        """stay: in the job afterwards, until `leave`."""
        training = TRAININGS[model]
        network = training.build()
        joined = ParameterService(
            master=master, job=model, token=model, rank=self.rank, workers=self.workers, snapshot_every=0
        )
        kind: Any = getattr(parameter_service, training.optimizer)
        optimizer = self._open.enter_context(kind(network.named_parameters(), service=joined, **training.settings))
        found = self._train(network.loss, optimizer, steps, self._checks(model, network, torch.equal))
        if not stay:
            self._open.close()
        return found

    def leave(self) -> dict[str, Any]:
        self._open.close()
        return {}

    def emulated(self, mode: str, masters: list[str], compute: float, steps: Steps) -> dict[str, Any]:
        """As many jobs side by side as `masters` names, each in a thread that sleeps as long as a GPU would compute."""
        groups = [dist.new_group() if mode == "ddp" else None for _ in masters]
        seconds: list[float] = []
        together = threading.Barrier(len(masters) + 1)

        def run(job: int) -> None:
            torch.manual_seed(job)
            training = Training(lambda: None, "AdamW", {"lr": 1e-3})
            parameters = [nn.Parameter(torch.randn(SHAPE)) for _ in range(TENSORS)]
            for parameter in parameters:
                parameter.grad = torch.randn(SHAPE)
            flat = torch.empty(sum(p.numel() for p in parameters))
            with ExitStack() as stack:
                if mode == "service":
                    name = f"emulated-{job}"
                    joined = ParameterService(masters[job], name, name, self.rank, self.workers, snapshot_every=0)
                    optimizer: Any = stack.enter_context(parameter_service.AdamW(parameters, lr=1e-3, service=joined))
                else:
                    optimizer = training.local(parameters)

                def step() -> None:
                    time.sleep(compute)
                    if mode == "ddp":
                        _all_reduce(parameters, flat, groups[job], self.workers)
                    optimizer.step()

                for _ in range(steps.warm_up):
                    step()
                together.wait()
                seconds.extend([_seconds(step) for _ in range(steps.measured)])
                together.wait()

        threads = [threading.Thread(target=run, args=(job,)) for job in range(len(masters))]
        for thread in threads:
            thread.start()
        together.wait()
        start = steps.cpu()
        together.wait()
        cpu = steps.cpu() - start
        for thread in threads:
            thread.join()
        return {"seconds": seconds, "cpu": cpu}

    def _train(
        self, loss: Callable[[int, int], Tensor], optimizer: Any, steps: Steps, check: Callable[[], None]
    ) -> dict[str, Any]:
        def step(number: int) -> None:
            optimizer.zero_grad()
            loss(number, self.rank).backward()
            optimizer.step()

        return steps.take(step, check)

    def _checks(self, model: str, network: nn.Module, same: Callable[[Tensor, Tensor], bool]) -> Callable[[], None]:
        def check() -> None:
            reference = self._references.get(model)
            if reference is not None and not all(
                same(p.detach(), expected) for p, expected in zip(network.parameters(), reference, strict=True)
            ):
                raise RuntimeError(f"the parameters of {model} are not those of one process")

        return check


def _seconds(call: Callable[..., None], *arguments: int) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _all_reduce(parameters: Sequence[nn.Parameter], flat: Tensor, group: Any, workers: int) -> None:
    """As DistributedDataParallel does it with one bucket."""
    start = 0
    for parameter in parameters:
        flat[start : start + parameter.numel()].view_as(parameter).copy_(parameter.grad)
        start += parameter.numel()
    flat.div_(workers)
    dist.all_reduce(flat, group=group)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def main() -> None:
    torch.set_num_threads(1)
    rank, workers = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=workers)
    worker = Worker(rank, workers)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order.get("steps"), dict):
            order["steps"] = Steps(**order["steps"])
        print(json.dumps(getattr(worker, order.pop("what"))(**order)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
