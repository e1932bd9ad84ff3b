"""Models that generate, simulated: eight fine-tunes of a small language model on a CPU, room for half of them.

The numbers are those of SmolLM2-135M in bfloat16 on two cores, about as `computron bench profile` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState
from computron.scheduling.policies.default import Default
from computron.scheduling.tuning import Tuning
from computron.simulation.arrivals import Constant, LogNormal, Settings, generate, zipf
from computron.simulation.hardware import Hardware, Link, SimulatedModel, StepTime
from computron.simulation.simulate import simulate
from computron.simulation.systems import SYSTEMS, System
from computron.simulation.workload import Workload

MODELS, RESIDENT = 8, 4
FRAME_BYTES = 1 << 20
CACHE_FRAMES = 24  # for each resident model
STEP = StepTime(base=0.03, per_prompt_token=0.0015, per_sequence=0.004, opening=0.01)
CACHE_BYTES_PER_TOKEN = 23_040


class Interrupting(Default):
    """The default policy, but a model with work gives way as soon as others waited for as long as a change costs."""

    def may_take(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        change = board.link.seconds(len(target.spec.pages) + len(victim.spec.pages))
        return target.waited(now) >= victim.work * change


WAYS: dict[str, System] = {
    "default": SYSTEMS["default"],
    "lru": SYSTEMS["lru"],
    "all-resident": SYSTEMS["all-resident"],
    "without_time_slice": System("", lambda setup: setup.scheduler("default", tuning=Tuning(time_slice=0.0))),
    "without_seniority": System("", lambda setup: setup.scheduler(Interrupting())),
}


def workloads(seed: int) -> list[Workload]:
    """Bursts of short answers, at two rates, and of long ones; 20 tokens of prompt each."""
    return [
        generate(
            Settings(
                zipf([model.name for model in models()], rate, 1.0),
                duration,
                cv,
                seed,
                prompt_tokens=Constant(20),
                output_tokens=tokens,
            )
        )
        for rate, cv, duration, tokens in (
            (1.5, 4.0, 90.0, Constant(4)),
            (3.0, 4.0, 90.0, Constant(4)),
            (0.2, 2.0, 600.0, LogNormal(64, 64)),
        )
    ]


def models() -> Sequence[SimulatedModel]:
    return [
        SimulatedModel(
            f"model{number}", 269_000_000, STEP, continuous=True, cache_bytes_per_token=CACHE_BYTES_PER_TOKEN
        )
        for number in range(MODELS)
    ]


def latencies(way: str, seeds: Iterable[int]) -> list[NDArray[np.float64]]:
    """Seconds of all requests, one array for each workload."""
    frames = RESIDENT * (models()[0].pages(FRAME_BYTES) + CACHE_FRAMES)
    hardware = Hardware(Link(8e9, 0.002), FRAME_BYTES, frames, request_overhead=0.002, answer_overhead=0.002)
    found: list[list[NDArray[np.float64]]] = [[] for _ in workloads(0)]
    for seed in seeds:
        for place, workload in enumerate(workloads(seed)):
            log = simulate(workload, hardware, models(), system=WAYS[way])
            found[place].append(np.array(log.finished) - np.array(log.arrived))
    return [np.concatenate(samples) for samples in found]
