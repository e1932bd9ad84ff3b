"""A production trace over groups of one GPU each: how many are enough?"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from computron.simulation.arrivals import LogNormal, Settings, generate, zipf
from computron.simulation.hardware import Hardware, Link, SimulatedModel, StepTime
from computron.simulation.presets import ORDER_SECONDS
from computron.simulation.simulate import simulate
from computron.simulation.traces import DAY, overlay, speed_up
from computron.simulation.workload import Arrival, Workload

MAX_GPUS = 32
SHARE = 0.99  # of the requests have to be in time
MULTIPLE, ALLOWANCE = 2.0, 2.0  # in time: within MULTIPLE x execution time + ALLOWANCE seconds
SMALLEST, LARGEST = 2e9, 7e9
FRAME_BYTES = 256 << 20  # coarse pages, to save events; a model has 8 to 27
HARDWARE = Hardware(Link(25e9, ORDER_SECONDS), FRAME_BYTES, int(40e9 // FRAME_BYTES))


@dataclass(frozen=True, slots=True)
class Played:
    """One simulation. longest_wait: from an arrival to the first step, in seconds."""

    attainment: float
    longest_wait: float


@dataclass(slots=True)
class Search:
    """The simulations of one system on one workload, by number of GPUs."""

    played: dict[int, Played] = field(default_factory=dict)

    @property
    def needed(self) -> int | None:
        """The smallest number of GPUs that is enough, and every larger one that was tried; None if MAX_GPUS are not."""
        enough = None
        for gpus in sorted(self.played, reverse=True):
            if self.played[gpus].attainment < SHARE:
                break
            enough = gpus
        return enough

    def run(self, play: Callable[[int], Played], guess: int) -> None:
        """Gallop from a guess, then halve. The neighbours of the answer are tried, one beyond it as well."""

        def enough(gpus: int) -> bool:
            if gpus not in self.played:
                self.played[gpus] = play(gpus)
            return self.played[gpus].attainment >= SHARE

        low, high = 0, MAX_GPUS + 1  # not enough; enough as far as is known
        gpus, stride = min(guess, MAX_GPUS), 1
        while high - low > 1:
            if enough(gpus):
                high = gpus
            else:
                low = gpus
            if low == 0:
                gpus = max(1, high - stride)
            elif high > MAX_GPUS:
                gpus = min(MAX_GPUS, low + stride)
            else:
                gpus = (low + high) // 2
            stride *= 2
        if high < MAX_GPUS and not enough(high + 1):  # attainment is not monotone: look on upwards
            self.run(play, high + 2)


def replay(trace: Workload, factor: float, rate: int) -> Workload:
    """`rate` copies of the trace, `factor` times as quick."""
    return speed_up(overlay(trace, rate), factor)


def checkpoints(trace: Workload, seconds: float, seed: int) -> list[SimulatedModel]:
    """Log-uniform sizes. seconds: of a step, of requests whose execution time is not told: those that warm up."""
    draw = random.Random(seed)
    return [
        SimulatedModel(
            name,
            round(math.exp(draw.uniform(math.log(SMALLEST), math.log(LARGEST)))),
            StepTime(seconds),
            max_batch_size=1,  # an image takes the whole device
        )
        for name in trace.models
    ]


def play(
    workload: Workload, models: Sequence[SimulatedModel], system: str, router: str, gpus: int, max_wait: float
) -> Played:
    log = simulate(workload, HARDWARE, models, system=system, groups=gpus, router=router, max_wait=max_wait)
    arrived = np.asarray(log.arrived)
    latency = np.asarray(log.finished) - arrived
    return Played(
        float(np.mean(latency <= allowed(workload))),  # what was rejected is NaN, and not in time
        float(np.nanmax(np.asarray(log.started) - arrived)),
    )


def allowed(workload: Workload) -> np.ndarray:
    seconds = [arrival.seconds or 0.0 for arrival in workload.arrivals]
    return MULTIPLE * np.asarray(seconds) + ALLOWANCE


def wait_bound(workload: Workload, models: Sequence[SimulatedModel], max_wait: float) -> float:
    """`max_wait`, and the longest swap and step."""
    swap = max(model.pages(FRAME_BYTES) for model in models) * FRAME_BYTES / HARDWARE.link.bandwidth
    return max_wait + swap + max(arrival.seconds or 0.0 for arrival in workload.arrivals)


def gpu_per_model(workload: Workload) -> tuple[int, float]:
    """GPUs that are enough if every model has its own, and the attainment of one GPU for each.

    A model's requests wait in one queue for all of its GPUs, first come, first served, and nothing is ever swapped.
    The model that is late most often is given one more GPU until enough requests are in time.
    """
    requests: dict[str, list[Arrival]] = {name: [] for name in workload.models}
    for arrival in workload.arrivals:
        requests[arrival.model].append(arrival)
    gpus = dict.fromkeys(workload.models, 1)
    late = Counter({name: late_requests(requests[name], 1) for name in workload.models})
    tolerated = (1 - SHARE) * len(workload.arrivals)
    alone = 1 - late.total() / len(workload.arrivals)
    while late.total() > tolerated:
        ((name, _),) = late.most_common(1)
        gpus[name] += 1
        late[name] = late_requests(requests[name], gpus[name])
    return sum(gpus.values()), alone


def late_requests(arrivals: Sequence[Arrival], gpus: int) -> int:
    """Of a queue in order of arrival before so many GPUs."""
    free = [0.0] * gpus
    late = 0
    for arrival in arrivals:
        seconds = arrival.seconds or 0.0
        end = max(arrival.time, free[0]) + seconds
        heapq.heapreplace(free, end)
        late += end - arrival.time > MULTIPLE * seconds + ALLOWANCE
    return late


def synthetic(seed: int, models: int = 24, days: int = 8, requests_a_day: int = 60) -> Workload:
    """Bursty requests for models of unequal popularity, as long as those of the trace: to try things out."""
    names = [f"model-{number}" for number in range(models)]
    rates = zipf(names, requests_a_day / DAY, exponent=1.2)
    workload = generate(
        Settings(rates, days * DAY, cv=6.0, seed=seed, output_tokens=LogNormal(26.0, 20.0)), "synthetic"
    )
    arrivals = tuple(a._replace(seconds=float(a.output_tokens), output_tokens=1) for a in workload.arrivals)
    return Workload("synthetic", workload.models, arrivals, workload.settings)
