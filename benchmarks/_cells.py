"""The workloads of Computron's experiment 2, simulated for many seeds, every system on the same arrivals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState
from computron.scheduling.policies.default import Default
from computron.scheduling.tuning import Tuning
from computron.simulation.group import Decider
from computron.simulation.presets import EXPERIMENT_2, Cell
from computron.simulation.simulate import simulate
from computron.simulation.surroundings import Surroundings
from computron.simulation.systems import SYSTEMS, Setup, System
from computron.simulation.systems.computron2023 import POLLING, TICK, published

WITHOUT = "without "  # before the name of a part, the name of the default policy that lacks it
TOLD = "told"


class OldestFirst(Default):
    """The default policy, but whoever waited longest comes, and nothing before it."""

    def next_to_bring(self, board: Board, absent: Sequence[ModelState], now: float) -> list[ModelState]:
        return list(absent[:1])


class LeastRecent(Default):
    """The default policy, but the model used least recently gives its pages."""

    def chance(self, model: ModelState, within: float, now: float) -> float:
        return within / (within + now - model.last_used)

    def worth(self, board: Board, model: ModelState, within: float, now: float) -> float:
        return self.chance(model, within, now)


class Told(Default):
    """The default policy that need not learn: it is told by what law the arrivals are drawn, but not what was drawn."""

    def __init__(self, cell: Cell) -> None:
        self._rates = {model.name: float(rate) for model, rate in zip(cell.models, cell.rates, strict=True)}
        self._variation = cell.cv**2

    def rate(self, model: ModelState) -> float:
        return self._rates[model.name]

    def chance(self, model: ModelState, within: float, now: float) -> float:
        """Of Gamma intervals."""
        silence, scale = model.arrivals.silence(now), self._variation / self.rate(model)
        silent, still_silent = _survival(1.0 / self._variation, (silence / scale, (silence + within) / scale))
        return 1.0 - still_silent / silent if silent > 0.0 else 1.0

    def next_request(self, model: ModelState, now: float) -> float | None:
        if self._variation > Tuning().regular:
            return None
        return max(now, now - model.arrivals.silence(now) + 1.0 / self.rate(model))


def _survival(shape: float, times: tuple[float, float]) -> list[float]:
    """How likely a Gamma interval of scale 1 is longer than each of the times."""
    found: list[float] = torch.special.gammaincc(torch.tensor(shape).double(), torch.tensor(times).double()).tolist()
    return found


def _tuned(part: str, tuning: Tuning) -> System:
    return System(WITHOUT + part, lambda setup: setup.scheduler("default", tuning=tuning))


def _default(setup: Setup) -> Decider:
    return setup.scheduler("default")


# What the default policy is without one of its parts, or on hardware that is used as the published system used it.
ABLATIONS = (
    System(WITHOUT + "prefetch", lambda setup: setup.scheduler("default", prefetch=False)),
    _tuned("pieces", Tuning(piece=math.inf)),
    _tuned("early_start", Tuning(early_start=0.0)),
    System(WITHOUT + "overlap", _default, surroundings=Surroundings(silent_stages=True)),
    System(WITHOUT + "weighing", lambda setup: setup.scheduler(OldestFirst())),
    System(WITHOUT + "expectation", lambda setup: setup.scheduler(LeastRecent())),
    System(WITHOUT + "dropping_weights", _default, surroundings=Surroundings(write_back=True)),
    System(WITHOUT + "own_small_copies", _default, surroundings=Surroundings(steps_behind_copies=True)),
)
SLEEPLESS = published("sleepless", replace(POLLING, retry=TICK))
_BY_NAME = {**SYSTEMS, **{system.name: system for system in ABLATIONS}}

Latencies = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one seed's requests. reproduced: what the published client would have measured of computron2023;
    sleepless: and of one whose engine looks again every 10 ms where it found an inbox full.
    """

    latencies: dict[str, Latencies]
    reproduced: Latencies
    sleepless: Latencies


@dataclass(frozen=True, slots=True)
class Measured:
    """All seeds of one cell that have any request."""

    cell: Cell
    samples: tuple[Sample, ...]

    def mean(self, system: str) -> float:
        """The mean over the seeds of their mean latencies."""
        return float(np.mean([sample.latencies[system].mean() for sample in self.samples]))

    def p99(self, system: str) -> float:
        """Of the requests of all seeds together."""
        return float(np.percentile(np.concatenate([sample.latencies[system] for sample in self.samples]), 99))

    @property
    def reproduced(self) -> list[float]:
        """The mean of each seed, as the published client would have measured it."""
        return [float(sample.reproduced.mean()) for sample in self.samples]

    @property
    def sleepless(self) -> list[float]:
        return [float(sample.sleepless.mean()) for sample in self.samples]


def measure(
    systems: Sequence[str], seeds: Iterable[int], jobs: int, *, cells: Sequence[Cell] = EXPERIMENT_2
) -> list[Measured]:
    """In the order of `cells`, whatever `jobs`, the number of processes."""
    seeds = tuple(seeds)
    work = [(cell, seed) for cell in cells for seed in seeds]
    run = partial(sample, systems=tuple(systems))
    if jobs == 1:
        samples = [run(task) for task in work]
    else:
        with get_context("spawn").Pool(jobs) as pool:
            samples = pool.map(run, work, chunksize=len(seeds))
    found = [samples[place * len(seeds) : (place + 1) * len(seeds)] for place in range(len(cells))]
    return [Measured(cell, tuple(one for one in of if one is not None)) for cell, of in zip(cells, found, strict=True)]


def sample(task: tuple[Cell, int], *, systems: Sequence[str]) -> Sample | None:
    """None where the seed gives no request."""
    cell, seed = task
    workload = cell.workload(seed)
    if not workload.arrivals:
        return None
    latencies = {}
    for name in systems:
        system = System(TOLD, lambda setup: setup.scheduler(Told(cell))) if name == TOLD else _BY_NAME[name]
        log = simulate(workload, cell.hardware, cell.models, system=system)
        latencies[name] = np.array(log.finished) - np.array(log.arrived)
    return Sample(latencies, np.array(cell.reproduction(seed)), np.array(cell.reproduction(seed, SLEEPLESS)))


def least_mean(cell: Cell) -> float | None:
    """A mean latency in seconds below which nobody gets who cannot see the future; None unless requests come at random.

    Of a Poisson process nobody knows which model the next request is for: it is for model i with the share of its rate,
    whatever pages are there. Those that lack when it comes take their time on the link, and what comes last in the
    image is computed after them. So the best is to lack pages of the models with the lowest rates, but of each model
    those first whose transfer hides behind its compute. Queues, and what it takes to bring pages back, are left out.
    """
    if cell.cv != 1.0:
        return None
    hardware, model = cell.hardware, cell.models[0]
    pages, page_seconds = model.pages(hardware.frame_bytes), hardware.frame_bytes / hardware.link.bandwidth
    compute = model.step.seconds(1)
    after_the_last = compute / hardware.stages * (hardware.stages - 1 + 1 / model.segments)
    hidden = (compute - after_the_last) / page_seconds
    lacking = len(cell.rates) * (pages - hidden) - hardware.frames
    waited = 0.0
    for rate in sorted(cell.rates):
        pages_here = min(max(lacking, 0.0), pages - hidden)
        waited += rate / sum(cell.rates) * pages_here * page_seconds
        lacking -= pages_here
    return hardware.request_overhead + compute + waited + hardware.answer_overhead
