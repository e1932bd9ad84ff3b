"""Systems on the same workload, and how they do as it grows or as groups are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.log import Log
from computron.simulation.results import Summary, Target, summarise
from computron.simulation.simulate import simulate
from computron.simulation.traces import denser
from computron.simulation.workload import Workload


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is the same for all systems; the fields are those of `simulate` and `summarise`."""

    workload: Workload
    hardware: Hardware
    models: tuple[SimulatedModel, ...]
    targets: tuple[Target, ...]
    groups: int = 1
    router: str = "resident"
    max_wait: float = 30.0
    warm: bool = True

    def run(self, system: str, *, load: float = 1.0, groups: int | None = None) -> tuple[Summary, Log]:
        workload = self.workload if load == 1.0 else denser(self.workload, load)
        log = simulate(
            workload,
            self.hardware,
            self.models,
            system=system,
            groups=self.groups if groups is None else groups,
            router=self.router,
            max_wait=self.max_wait,
            warm=self.warm,
        )
        return summarise(log, workload, self.hardware, targets=self.targets), log


@dataclass(frozen=True, slots=True)
class Point:
    """What came of one load, or of one number of groups (`at`)."""

    at: float
    attainment: dict[str, float]
    mean: float | None
    p99: float | None
    device_utilisation: float
    link_utilisation: float


Sweep = dict[str, list[Point]]


def sweep(systems: Iterable[str], values: Sequence[float], run: Callable[[str, float], Summary]) -> Sweep:
    """`run(system, value)` for all of them, values in ascending order."""
    return {system: [_point(value, run(system, value)) for value in sorted(values)] for system in systems}


def _point(at: float, summary: Summary) -> Point:
    latency = summary.latency
    mean, p99 = (latency.mean, latency.p99) if latency is not None else (None, None)
    return Point(at, summary.attainment, mean, p99, summary.device_utilisation, summary.link_utilisation)
