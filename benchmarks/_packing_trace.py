"""A trace of training jobs through the packers: aggregators reserved, and what the jobs lose by sharing them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
from _common import Report

from computron.parameter_service.packing import PACKERS, Limits
from computron.parameter_service.simulation.experiment import Replay, ServerPerJob, replay, simulated_losses
from computron.parameter_service.simulation.trace import MODELS, Costs, TracedJob

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT = 0.1  # of the paper
OTHER_LIMITS = (0.05, 0.2)
HOUR = 3600.0
JITTER = 0.02  # of compute times, where moments are simulated
MOMENTS, QUICK_MOMENTS = 60, 6
QUICK_JOBS = 60
PREFIX = {"utilisation": "", "cyclic": "cyclic_"}
ROWS = (
    *("reserved_ratio", "over_bound", "worst_loss", "mean_loss"),
    *("simulated_worst_loss", "simulated_mean_loss", "simulated_over_limit", "moves_per_job"),
)
NAMES = (
    *(f"packing.trace.{row}" for row in ("cpu_ratio", "bound_ratio", "unrounded_bound_ratio", "two_per_job_ratio")),
    *(f"packing.trace.{prefix}{row}" for prefix in PREFIX.values() for row in ROWS),
    *(
        f"packing.trace.limit_{limit:g}.{prefix}{row}"
        for limit in OTHER_LIMITS
        for prefix in PREFIX.values()
        for row in ("reserved_ratio", "simulated_over_limit")
    ),
)


@dataclass(frozen=True, slots=True)
class Task:
    jobs: Sequence[TracedJob]
    packer: str
    limit: float
    moments: int
    seed: int


@dataclass(frozen=True, slots=True)
class Packed:
    """simulated: losses of all jobs at all sampled moments."""

    packer: str
    limit: float
    replay: Replay
    simulated: np.ndarray
    seconds: float


def work_on(task: Task) -> Packed:
    began = time.monotonic()
    limits = Limits(loss=task.limit)
    every = max(1, 2 * len(task.jobs) // task.moments)
    played = replay(task.jobs, PACKERS[task.packer](limits), keep_every=every)
    losses = [
        loss
        for number, moment in enumerate(played.moments)
        for loss in simulated_losses(moment.fleet, limits, jitter=JITTER, seed=task.seed + number).values()
    ]
    played.moments.clear()
    return Packed(task.packer, task.limit, played, np.array(losses), time.monotonic() - began)


def work_off(tasks: Sequence[Task], processes: int) -> Iterator[Packed]:
    """As they come to an end."""
    if processes == 1:
        yield from map(work_on, tasks)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(work_on, tasks)


def synthetic(seed: int) -> list[TracedJob]:
    """Jobs of the trace's models, of which nothing else is real."""
    random = np.random.default_rng(seed)
    costs, names = Costs(), sorted(MODELS)
    arrivals = np.cumsum(random.exponential(600.0, QUICK_JOBS))
    jobs = []
    for number, arrival in enumerate(arrivals.tolist()):
        kind, workers = str(random.choice(names)), int(random.choice([1, 1, 2, 4]))
        load = costs.load(f"job-{number}", MODELS[kind], workers, float(random.uniform(0.02, 0.5)))
        jobs.append(TracedJob(load, kind, workers, arrival, float(random.exponential(6_000.0)) / load.period))
    return jobs


def measure(report: Report, jobs: Sequence[TracedJob], *, quick: bool, seed: int, processes: int) -> None:
    moments = QUICK_MOMENTS if quick else MOMENTS
    tasks = [
        Task(jobs, packer, limit, moments, seed)
        for limit in (LIMIT, *OTHER_LIMITS)
        for packer in ("utilisation", "cyclic")
    ]
    guessed = sum(not job.measured for job in jobs)
    print(f"{len(jobs)} jobs; {guessed} with the speed of fewer workers, since theirs was not measured")
    separate = replay(jobs, ServerPerJob())
    found: dict[tuple[str, float], Packed] = {}
    for packed in work_off(tasks, processes):
        found[packed.packer, packed.limit] = packed
        print(f"{packed.packer}, limit {packed.limit:g}: {packed.seconds:.0f} s", flush=True)
    _add_bounds(report, separate, found["utilisation", LIMIT].replay)
    for (packer, limit), packed in sorted(found.items(), reverse=True):
        _add(report, packed, separate, PREFIX[packer] if limit == LIMIT else f"limit_{limit:g}.{PREFIX[packer]}")
    ours = [found[packer, LIMIT].replay for packer in PREFIX]
    report.plot(lambda axes: draw(axes, (separate, *ours)))


def _add_bounds(report: Report, separate: Replay, ours: Replay) -> None:
    unit = "core hours"
    for row, value, baseline in (
        ("cpu_ratio", ours.cpu, separate.cpu),
        ("bound_ratio", separate.rounded, separate.reserved),
        ("unrounded_bound_ratio", separate.used, separate.reserved),
        ("two_per_job_ratio", ours.reserved, 2 * separate.reserved),
    ):
        report.row(f"packing.trace.{row}", value / HOUR, unit, baseline / HOUR, value / baseline)


def _add(report: Report, packed: Packed, separate: Replay, prefix: str) -> None:
    played, simulated, limit = packed.replay, packed.simulated, packed.limit
    name = f"packing.trace.{prefix}"
    hours = played.reserved / HOUR
    report.row(
        f"{name}reserved_ratio", hours, "core hours", separate.reserved / HOUR, played.reserved / separate.reserved
    )
    report.row(f"{name}over_bound", hours, "core hours", separate.rounded / HOUR, played.reserved / separate.rounded)
    for row, loss in (
        ("worst_loss", played.worst),
        ("mean_loss", float(np.mean(list(played.losses.values())))),
        ("simulated_worst_loss", float(simulated.max())),
        ("simulated_mean_loss", float(simulated.mean())),
    ):
        report.row(f"{name}{row}", loss, "of speed", limit, loss / limit)
    over = float(np.mean(simulated > limit))
    report.row(f"{name}simulated_over_limit", over, f"of {len(simulated)} samples", None, over)
    moves = played.moves / len(played.losses)
    report.row(f"{name}moves_per_job", moves, "blocks", None, moves)


def draw(axes: Axes, replays: Iterable[Replay]) -> None:
    """Aggregators over time."""
    for played in replays:
        times = [time / HOUR / 24 for time, _, _ in played.timeline]
        axes.step(times, [count for _, count, _ in played.timeline], where="post", label=played.packer, linewidth=0.8)
    axes.set_xlabel("days")
    axes.set_ylabel("aggregators")
    axes.legend()
