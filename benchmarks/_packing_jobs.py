"""Training jobs that bench_packing emulates, how they are started, and how fast they are.

A job's parameters and compute time are those of a published model and measurement, both divided by a scale: what share
of an aggregator's time its work takes stays the same. So that all of it fits two cores, a job has one worker process,
which stands for all of its workers: its compute time is shortened by as much as the missing additions of gradients
shorten the aggregation, by the costs of the trace's simulation.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from _emulated_worker import PROGRESS, Task

from computron.parameter_service.simulation.trace import Costs

WORKER = Path(__file__).parent / "_emulated_worker.py"
EQUAL_SCALE = 2
MIXED_SCALE = 1  # short steps are lost among those of other processes that share the cores
COSTS = Costs()
BLOCK_ELEMENTS = 1 << 20
JITTER = 0.02  # of compute times
START = 60.0  # seconds within which a job has to take steps
EQUAL_LIMIT = 0.1  # loss limit of jobs; AutoPS's
MIXED_LIMIT = 0.07  # below the loss that they are to stay within: they also wait for cores
FIRST_STEPS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """tensors: elements of each, in the order of the forward pass. compute: seconds of an iteration on one device."""

    name: str
    tensors: tuple[int, ...]
    optimizer: str
    compute: float
    workers: int = 2

    def emulated_compute(self, scale: int) -> float:
        """Seconds of the one worker that stands for all."""
        apply = COSTS.adam if self.optimizer == "adamw" else COSTS.sgd
        return self.compute / scale * apply / (apply + (self.workers - 1) * COSTS.add)


_BERT_LAYER = (2_363_904, 4_723_968)  # attention, feed-forward; norms with them
_BERT = (23_837_184, *_BERT_LAYER * 12, 590_592)

# torchvision's; 512 images at 2,987 a second on a P100 (TensorFlow benchmarks, May 2017, DGX-1, synthetic data).
ALEXNET = Shape(
    "alexnet", (23_296, 307_392, 663_936, 884_992, 590_080, 37_752_832, 16_781_312, 4_097_000), "sgd", 512 / 2987
)
# torchvision's; 64 images at 154 a second for VGG16 (the same), 1.21 times that for VGG19 (jcjohnson/cnn-benchmarks,
# GTX 1080, 281.69 ms against 232.55).
VGG19 = Shape(
    "vgg19",
    (
        *(1_792, 36_928, 73_856, 147_584, 295_168, 590_080, 590_080, 590_080, 1_180_160),
        *(2_359_808,) * 7,
        *(102_764_544, 16_781_312, 4_097_000),
    ),
    "sgd",
    64 / 154 * 281.69 / 232.55,
)
# salesforce/awd-lstm-lm on WikiText-2: tied embeddings of 400, LSTMs of 1,150; 105 s for an epoch of 373 steps on a
# GP100.
AWD_LM = Shape("awd_lm", (13_311_200, 7_139_200, 10_589_200, 2_483_200, 33_278), "sgd", 105 / 373)
# BERT-Base; 24 sequences of 384 tokens at 42 a second on a V100 in fp32 (lambdal/deeplearning-benchmark, SQuAD).
BERT = Shape("bert", _BERT, "adamw", 24 / 42)

# 64 images at 219 a second on a P100 (TensorFlow benchmarks).
RESNET50 = Shape(
    "resnet50", (9_536, 215_808, 1_219_584, 7_098_368, 14_964_736, 2_049_000), "sgd", 64 / 219
)  # fmt: skip
# Gavel's autoencoder for MovieLens-20M; its time is assumed.
RECOMMENDER = Shape("recommender", (4_041_708, 4_021_800), "adamw", 0.1, workers=1)
# Rank 16 on the queries and values of 32 layers of 4,096; its time is assumed.
LORA = Shape("lora", (262_144,) * 32, "adamw", 1.2, workers=1)
# BERT's parameters once in 16 inner steps, as outer steps of DiLoCo are: a burst now and then.
OUTER_STEPS = Shape("outer_steps", _BERT, "sgd", 16 * BERT.compute, workers=1)

EQUAL = (ALEXNET, VGG19, AWD_LM, BERT)
MIXED = (ALEXNET, VGG19, AWD_LM, BERT, RESNET50, RECOMMENDER, LORA, OUTER_STEPS)


class Job:
    """One that trains until it is stopped."""

    def __init__(
        self, master: str, name: str, shape: Shape, scale: int, loss_limit: float, folder: Path, seed: int
    ) -> None:
        self.name, self.shape = name, shape
        path = folder / f"progress-{name}"
        path.write_bytes(bytes(PROGRESS.size))
        with path.open("r+b") as file:
            self._progress = mmap.mmap(file.fileno(), PROGRESS.size)
        tensors = tuple(-(-count // scale) for count in shape.tensors)
        task = Task(
            master, name, shape.optimizer, tensors, BLOCK_ELEMENTS // scale, shape.emulated_compute(scale), JITTER,
            loss_limit, seed, str(path),
        )  # fmt: skip
        self._worker = subprocess.Popen([sys.executable, str(WORKER), msgspec.json.encode(task).decode()])

    def wait(self) -> None:
        """Until it takes steps. Raises RuntimeError if it does not."""
        deadline = time.monotonic() + START
        while self.now()[0] < FIRST_STEPS:
            self.require_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {self.name} took no steps within {START} s")
            time.sleep(0.05)

    def require_alive(self) -> None:
        if self._worker.poll() is not None:
            raise RuntimeError(f"the worker of job {self.name} has ended")

    def now(self) -> tuple[int, float]:
        """Steps so far, and when the last one ended."""
        while True:
            steps, ended = PROGRESS.unpack_from(self._progress)
            if (steps, ended) == PROGRESS.unpack_from(self._progress):
                return steps, ended

    def stop(self) -> None:
        self._worker.kill()
        self._worker.wait()
        self._progress.close()


def iteration_times(jobs: Sequence[Job], seconds: float) -> dict[str, float]:
    """Mean seconds of a step of each, measured at the same time, over so many seconds or two steps."""
    before = {job.name: job.now() for job in jobs}
    time.sleep(seconds)
    deadline = time.monotonic() + START
    times = {}
    for job in jobs:
        job.require_alive()
        steps, ended = job.now()
        while steps < before[job.name][0] + 2:
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {job.name} stands still")
            time.sleep(0.01)
            steps, ended = job.now()
        times[job.name] = (ended - before[job.name][1]) / (steps - before[job.name][0])
    return times
