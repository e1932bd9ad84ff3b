"""Training jobs of Gavel's traces (Narayanan et al., OSDI 2020) with what an aggregator would do for each.

A trace has a line a job; throughputs are steps a second by type of worker, type of job and number of workers, counted
over all workers together. Parameters are counted from the models in Gavel's repository, `workloads/pytorch`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from computron.parameter_service.packing import BlockLoad, JobLoad

FIELDS = 7


@dataclass(frozen=True, slots=True)
class Model:
    """parameters: elements trained. adam: by Adam, else by SGD."""

    parameters: int
    adam: bool


MODELS = {
    "ResNet-18": Model(11_173_962, adam=False),  # for CIFAR-10: 3 x 3 first convolution, 10 classes
    "ResNet-50": Model(25_557_032, adam=False),  # torchvision's
    "Transformer": Model(47_252_480, adam=True),  # 6 + 6 layers of 512; vocabularies of Multi30k, about 6,000 words
    "LM": Model(13_987_678, adam=False),  # 2 LSTM layers of 200, WikiText-2 (33,278 words), untied
    "Recommendation": Model(8_063_508, adam=True),  # autoencoder 20,108 - 200 - 20,108 for MovieLens-20M
    "A3C": Model(3_249_639, adam=True),  # 4 convolutions and an LSTM cell of 512, Pong
    "CycleGAN": Model(28_285_832, adam=True),  # 2 generators of 9 residual blocks, 2 discriminators
}


@dataclass(frozen=True, slots=True)
class Costs:
    """Of aggregation: seconds of one compute thread for each element, and bytes. Measured over 25 M elements in fp32 on
    a Xeon of 2.3 GHz with torch's kernels: add, fused AdamW, fused SGD with momentum.

    block: elements of the largest block. The first worker's gradients are added to nothing.
    """

    add: float = 6.4e-3 / 25e6
    adam: float = 11.5e-3 / 25e6
    sgd: float = 8.4e-3 / 25e6
    adam_bytes: int = 12
    sgd_bytes: int = 8
    block: int = 4 << 20

    def load(self, name: str, model: Model, workers: int, compute: float) -> JobLoad:
        """Of a job that computes for so many seconds between two steps."""
        apply, size = (self.adam, self.adam_bytes) if model.adam else (self.sgd, self.sgd_bytes)
        seconds = apply + (workers - 1) * self.add
        count = math.ceil(model.parameters / self.block)
        sizes = [self.block] * (count - 1) + [model.parameters - (count - 1) * self.block]
        blocks = tuple(BlockLoad(place, size_ * seconds, size_ * size) for place, size_ in enumerate(sizes))
        return JobLoad(name, compute + math.fsum(block.cpu for block in blocks), blocks)


@dataclass(frozen=True, slots=True)
class TracedJob:
    """arrival: seconds. steps: of all workers together, one each. measured: is the speed that of so many workers?"""

    load: JobLoad
    kind: str
    workers: int
    arrival: float
    steps: float
    measured: bool = True


def read_gavel(trace: Path, throughputs: Path, *, worker: str = "v100", costs: Costs | None = None) -> list[TracedJob]:
    """Jobs in the order of arrival. An iteration is the traced one, then the aggregation, with nothing overlapped.

    Where the speed of a number of workers was not measured, each works as fast as in the largest smaller number that
    was. Raises OSError, or ValueError with the file, and the line if it is the trace's.
    """
    costs = costs or Costs()
    speeds = _read_throughputs(throughputs, worker)
    jobs = []
    with trace.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                jobs.append(_job(f"job-{number}", line, speeds, costs))
            except ValueError as error:
                raise ValueError(f"{trace}:{number}: {error}") from error
    return sorted(jobs, key=lambda job: job.arrival)


Speeds = Mapping[str, Mapping[int, float]]


def _read_throughputs(path: Path, worker: str) -> Speeds:
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, float | dict[str, object]]])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    if worker not in content:
        raise ValueError(f'{path}: no type of worker "{worker}" (there are: {", ".join(sorted(content))})')
    speeds: dict[str, dict[int, float]] = {}
    for key, speed in content[worker].items():
        kind, workers = ast.literal_eval(key)
        if isinstance(speed, float) and speed > 0.0:
            speeds.setdefault(kind, {})[workers] = speed
    return speeds


def _job(name: str, line: str, speeds: Speeds, costs: Costs) -> TracedJob:
    fields = line.rstrip("\n").split("\t")
    if len(fields) != FIELDS:
        raise ValueError(f"{len(fields)} fields separated by tabs instead of {FIELDS}")
    kind, steps, arrival, workers = fields[0], float(fields[4]), float(fields[5]), int(fields[6])
    model = MODELS.get(kind.split(" (")[0])
    if model is None:
        raise ValueError(f'unknown model in "{kind}" (known: {", ".join(MODELS)})')
    measured = [count for count in speeds.get(kind, ()) if count <= workers]
    if not measured:
        raise ValueError(f'no speed of "{kind}" with up to {workers} workers')
    largest = max(measured)
    load = costs.load(name, model, workers, largest / speeds[kind][largest])
    return TracedJob(load, kind, workers, arrival, steps / workers, largest == workers)
