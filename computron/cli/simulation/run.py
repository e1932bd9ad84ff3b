"""Runs what was asked for, shows it, and writes the files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.table import Table

from computron.cli.output import errors, output, wide
from computron.cli.simulation.options import Asked
from computron.simulation.experiment import Experiment, Sweep, sweep
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.log import Log
from computron.simulation.overload import asked_for, overloaded
from computron.simulation.report import plots, table
from computron.simulation.report.timeline import write_timeline
from computron.simulation.results import Floats, Summary, latencies


@dataclass(frozen=True, slots=True)
class Wanted:
    """The output, beside the table of systems."""

    per_model: bool = False
    json: Path | None = None
    plot: Path | None = None
    timeline: Path | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What --json writes."""

    workload: str
    settings: Mapping[str, object]
    hardware: Hardware
    models: tuple[SimulatedModel, ...]
    groups: int
    router: str
    max_wait: float
    systems: dict[str, Summary]
    overloaded: tuple[str, ...] = ()
    against_load: Sweep = field(default_factory=dict)
    against_groups: Sweep = field(default_factory=dict)


class Runs:
    """Runs of one experiment. Keeps what pictures need, and the logs only for a timeline."""

    def __init__(self, experiment: Experiment, wanted: Wanted) -> None:
        self.requests = 0
        self.seconds = 0.0
        self.latencies: dict[str, Floats] = {}
        self.logs: dict[str, Log] = {}
        self.overloaded: list[str] = []
        self._experiment = experiment
        self._wanted = wanted

    def main(self, system: str) -> Summary:
        summary, log = self._run(system)
        if overloaded(log, self._experiment.workload, summary, self._experiment.max_wait):
            self.overloaded.append(system)
        if self._wanted.plot is not None:
            self.latencies[system] = latencies(log)
        if self._wanted.timeline is not None:
            self.logs[system] = log
        return summary

    def at_load(self, system: str, load: float) -> Summary:
        return self._run(system, load=load)[0]

    def on_groups(self, system: str, groups: float) -> Summary:
        return self._run(system, groups=int(groups))[0]

    def _run(self, system: str, *, load: float = 1.0, groups: int | None = None) -> tuple[Summary, Log]:
        began = time.perf_counter()
        words = f"simulating {system}"
        words += f" at {load:g} of the load" if load != 1.0 else ""
        words += f" on {groups} groups" if groups is not None else ""
        with errors.status(words):  # on a terminal only
            summary, log = self._experiment.run(system, load=load, groups=groups)
        self.requests += summary.requests
        self.seconds += time.perf_counter() - began
        return summary, log


def run(asked: Asked, wanted: Wanted) -> None:
    """Raises ValueError for what cannot be simulated or drawn, OSError for what cannot be written."""
    experiment = asked.experiment
    _check_files(wanted)
    for note in asked.notes:
        errors.print(f"note: {note}", markup=False)
    runs = Runs(experiment, wanted)
    summaries = {system: runs.main(system) for system in asked.systems}
    against_load = sweep(asked.systems, asked.loads, runs.at_load) if asked.loads else {}
    against_groups = sweep(asked.systems, asked.group_counts, runs.on_groups) if asked.group_counts else {}
    _show(experiment, summaries, runs.overloaded, against_load, against_groups, per_model=wanted.per_model)
    output.print(
        f"{runs.requests} requests simulated in {runs.seconds:.1f} s: {runs.requests / runs.seconds:.0f} a second"
    )
    if wanted.json is not None:
        results = Results(
            experiment.workload.name,
            experiment.workload.settings,
            experiment.hardware,
            experiment.models,
            experiment.groups,
            experiment.router,
            experiment.max_wait,
            summaries,
            tuple(runs.overloaded),
            against_load,
            against_groups,
        )
        wanted.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    if wanted.plot is not None:
        _draw(experiment, runs.latencies, against_load, against_groups, wanted.plot)
    if wanted.timeline is not None:
        write_timeline(runs.logs, wanted.timeline, _title(experiment))


def _check_files(wanted: Wanted) -> None:
    """Before anything runs for minutes."""
    if wanted.plot is not None:
        plots.check(wanted.plot)
    for path in (wanted.json, wanted.timeline):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder")


def _title(experiment: Experiment, groups: int | None = None) -> str:
    """groups: 0: several numbers of them."""
    workload = experiment.workload
    count = experiment.groups if groups is None else groups
    words = "1 group" if count == 1 else f"{count or ''} groups".strip()
    hardware = experiment.hardware
    return (
        f"{len(workload.arrivals)} requests to {len(workload.models)} models ({workload.name}) on {words} of "
        f"{table.size(hardware.frames * hardware.frame_bytes)} at {table.size(hardware.link.bandwidth)}/s"
    )


def _host_memory(experiment: Experiment) -> str:
    needed = table.size(sum(model.bytes for model in experiment.models))
    return f"needs {needed} of host memory a group, for each of its nodes"


def _show(
    experiment: Experiment,
    summaries: Mapping[str, Summary],
    too_much: Sequence[str],
    load: Sweep,
    groups: Sweep,
    *,
    per_model: bool,
) -> None:
    wide.print(_title(experiment), style="bold", markup=False)
    _print(_host_memory(experiment), table.comparison(summaries))
    for system in too_much:
        wide.print(
            table.overload(system, summaries[system], asked_for(experiment.workload)), markup=False, soft_wrap=True
        )
    if per_model:
        for system, summary in summaries.items():
            _print(f"\n{system}, by model", table.per_model(summary))
    for name, found in (("load", load), ("groups", groups)):
        for target in experiment.targets if found else ():
            _print(f"\nin time ({target}) against {name}", table.swept(name, found, str(target)))


def _print(title: str, what: Table) -> None:
    wide.print(title, style="bold", markup=False)
    wide.print(what)


def _draw(experiment: Experiment, ordered: Mapping[str, Floats], load: Sweep, groups: Sweep, path: Path) -> None:
    target = str(experiment.targets[0])
    pictures = {"latency": plots.latency_cdfs(ordered, _title(experiment))}
    for name, found in (("load", load), ("groups", groups)):
        if found:
            curves = {system: [(p.at, p.attainment[target]) for p in points] for system, points in found.items()}
            about = _title(experiment, 0 if name == "groups" else None)
            pictures[name] = plots.attainment(curves, name, target, about)
    plots.write(pictures, path)
