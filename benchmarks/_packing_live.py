"""Jobs that train on the live service: on how many aggregators the master puts them, and what they lose by it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from _common import Report
from _packing_jobs import (
    EQUAL,
    EQUAL_LIMIT,
    EQUAL_SCALE,
    MIXED,
    MIXED_LIMIT,
    MIXED_SCALE,
    Job,
    Shape,
    iteration_times,
)
from _service import Service, cpu_seconds, service

MOST = 8
MEMORY = "6GiB"  # of an aggregator; never what decides
INTERVAL, HYSTERESIS = 1.0, 1.0  # seconds between two looks; for which an aggregator must have been dispensable
CALM = 16.0  # seconds without a change after which the master has settled: longer than it waits after a loss
SETTLES = 300.0  # seconds within which it must have
ATTEMPTS = 5  # at a measurement in which aggregators neither come nor leave
WINDOW, QUICK_WINDOW = 10.0, 4.0  # seconds of one measurement
MIXED_WINDOW = 30.0
MIXED_ROUNDS = 2
EQUAL_LOSS, MIXED_LOSS = 0.05, 0.1  # what they are judged by
COUNTS, QUICK_COUNTS = (2, 3, 4), (2,)
PUBLISHED = {"alexnet": (3, 3, 4), "vgg19": (2, 2, 2), "awd_lm": (2, 2, 3), "bert": (2, 3, 3)}  # for COUNTS; AutoPS
EQUAL_ROWS = ("aggregators", "loss", "worst_loss")
MIXED_ROWS = ("reserved_ratio", "worst_loss", "mean_loss", "cpu_ratio")


def equal_names(*, quick: bool) -> tuple[str, ...]:
    shapes, counts = (EQUAL[:1], QUICK_COUNTS) if quick else (EQUAL, COUNTS)
    return tuple(f"packing.{n}jobs.{shape.name}.{row}" for shape in shapes for n in counts for row in EQUAL_ROWS)


MIXED_NAMES = tuple(f"packing.mixed.{row}" for row in MIXED_ROWS)


@dataclass
class Found:
    """aggregators: that ran in each round when the master had settled. packed, own: seconds of a step of each job, in
    each round, there and with an aggregator each. cpu, own_cpu: of all aggregators, in seconds a second.
    """

    aggregators: list[int] = field(default_factory=list)
    packed: list[dict[str, float]] = field(default_factory=list)
    own: list[dict[str, float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    own_cpu: list[float] = field(default_factory=list)

    def losses(self) -> dict[str, float]:
        """Of each job: 1 - D / d, for an iteration of d instead of D seconds, each the mean of all rounds."""
        return {
            job: 1.0 - _mean([times[job] for times in self.own]) / _mean([times[job] for times in self.packed])
            for job in self.own[0]
        }


class Live:
    """A service whose master packs, and the jobs on it."""

    def __init__(self, running: Service, scale: int, loss_limit: float, seed: int) -> None:
        self.service = running
        self.jobs: list[Job] = []
        self._scale = scale
        self._loss_limit = loss_limit
        self._seed = seed

    def arrive(self, shape: Shape) -> None:
        number = len(self.jobs)
        name = f"{shape.name}-{number + 1}"
        seed = self._seed + 10 * number
        job = Job(self.service.url, name, shape, self._scale, self._loss_limit, self.service.folder, seed)
        self.jobs.append(job)
        job.wait()

    def settle(self) -> int:
        """Wait until the master changes nothing any more; how many aggregators there are then."""
        deadline = time.monotonic() + SETTLES
        seen, since = self._placement(), time.monotonic()
        while time.monotonic() - since < CALM:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the master does not settle:\n{self.service.said()}")
            time.sleep(0.2)
            now = self._placement()
            if now != seen:
                seen, since = now, time.monotonic()
        return len(self.service.aggregators())

    def spread(self) -> None:
        """An aggregator for each job."""
        self.service.post("/v1/aggregators", {"count": len(self.jobs)})
        self.service.until(lambda: len(self.service.aggregators()) >= len(self.jobs))
        targets = [one["id"] for one in self.service.aggregators()]
        wanted = dict(zip((job.name for job in self.jobs), targets, strict=False))

        def there() -> bool:
            now = {one["id"]: one for one in self.service.get("/v1/jobs")["data"]}
            away = [name for name, target in wanted.items() if set(now[name]["aggregators"]) != {target}]
            for name in away:
                if not now[name]["moving"]:
                    self.service.post(f"/v1/jobs/{name}/move", {"to": wanted[name]})
            return not away and not any(now[name]["moving"] for name in wanted)

        self.service.until(there)

    def measure(self, seconds: float) -> tuple[dict[str, float], float] | None:
        """Seconds of a step of each job, and of all aggregators' CPU a second; None if one came or left meanwhile."""
        pids = [one["pid"] for one in self.service.aggregators()]
        began, before = time.monotonic(), sum(map(cpu_seconds, pids))
        times = iteration_times(self.jobs, seconds)
        if [one["pid"] for one in self.service.aggregators()] != pids:
            return None
        return times, (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - began)

    def compare(self, seconds: float, rounds: int) -> Found:
        """In turn: packed by the master, an aggregator for each job; packed once more at last."""
        found = Found()
        for _ in range(rounds):
            self._measure_packed(found, seconds)
            self.spread()
            measured = self.measure(seconds)
            assert measured is not None, "the master took an aggregator away that was asked for"
            times, cpu = measured
            found.own.append(times)
            found.own_cpu.append(cpu)
            self.service.post("/v1/aggregators", {"count": 1})
        self._measure_packed(found, seconds)
        return found

    def _measure_packed(self, found: Found, seconds: float) -> None:
        for _ in range(ATTEMPTS):
            used = self.settle()
            measured = self.measure(seconds)
            if measured is not None:
                found.aggregators.append(used)
                found.packed.append(measured[0])
                found.cpu.append(measured[1])
                return
        raise RuntimeError(f"the master does not settle:\n{self.service.said()}")

    def _placement(self) -> object:
        jobs = {one["id"]: (one["aggregators"], one["moving"]) for one in self.service.get("/v1/jobs")["data"]}
        return jobs, [(one["id"], one["state"]) for one in self.service.get("/v1/aggregators")["data"]]


@contextmanager
def live(scale: int, loss_limit: float, seed: int) -> Iterator[Live]:
    options = ("--aggregators", f"1:{MOST}", "--interval", f"{INTERVAL:g}s", "--hysteresis", f"{HYSTERESIS:g}s")
    with service(1, *options, memory=MEMORY) as running:
        found = Live(running, scale, loss_limit, seed)
        try:
            yield found
        finally:
            for job in found.jobs:
                job.stop()


def measure_equal(report: Report, *, quick: bool, seed: int) -> None:
    shapes, counts = (EQUAL[:1], QUICK_COUNTS) if quick else (EQUAL, COUNTS)
    for shape in shapes:
        with live(EQUAL_SCALE, EQUAL_LIMIT, seed) as running:
            running.arrive(shape)
            for count in counts:
                running.arrive(shape)
                found = running.compare(QUICK_WINDOW if quick else WINDOW, 1)
                _tell(f"{count} jobs of {shape.name}", found)
                _add_equal(report, shape, count, found)


def measure_mixed(report: Report, *, seed: int) -> None:
    with live(MIXED_SCALE, MIXED_LIMIT, seed) as running:
        for shape in MIXED:
            running.arrive(shape)
        found = running.compare(MIXED_WINDOW, MIXED_ROUNDS)
        _tell("mixed jobs", found)
        _add_mixed(report, found)


def _add_equal(report: Report, shape: Shape, count: int, found: Found) -> None:
    name = f"packing.{count}jobs.{shape.name}"
    published = PUBLISHED[shape.name][COUNTS.index(count)]
    used, losses = max(found.aggregators), list(found.losses().values())
    report.row(f"{name}.aggregators", used, "aggregators", published, used / published)
    report.row(f"{name}.loss", _mean(losses), "of speed", EQUAL_LOSS, _mean(losses) / EQUAL_LOSS)
    report.row(f"{name}.worst_loss", max(losses), "of speed", EQUAL_LOSS, max(losses) / EQUAL_LOSS)


def _add_mixed(report: Report, found: Found) -> None:
    used, losses = max(found.aggregators), list(found.losses().values())
    report.row("packing.mixed.reserved_ratio", used, "aggregators", len(MIXED), used / len(MIXED))
    report.row("packing.mixed.worst_loss", max(losses), "of speed", MIXED_LOSS, max(losses) / MIXED_LOSS)
    report.row("packing.mixed.mean_loss", _mean(losses), "of speed", MIXED_LOSS, _mean(losses) / MIXED_LOSS)
    cpu, own = _mean(found.cpu), _mean(found.own_cpu)
    report.row("packing.mixed.cpu_ratio", cpu, "s/s", own, cpu / own)


def _tell(what: str, found: Found) -> None:
    print(f"{what}: aggregators {', '.join(map(str, found.aggregators))}")
    for job, loss in found.losses().items():
        packed, own = ([f"{times[job] * 1e3:.1f}" for times in kind] for kind in (found.packed, found.own))
        print(f"  {job}: {', '.join(packed)} ms packed, {', '.join(own)} ms on its own: loss {loss:.3f}", flush=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
