"""How do Computron and others do on the workloads of Computron's paper (arXiv 2306.13835, experiment 2)?

Simulated: four A100s in numbers (computron/simulation/presets.py), the scheduler that serves, 30 seconds of requests to
three or six OPT-13B with room for two or four, 40 seeds, every system on the same arrivals. Nothing runs on a device;
`--device` changes nothing. `bench_workloads_live` runs some of it live, on a smaller scale.

`cells.{models}x{resident}.{rates}.cv{cv}.mean_ratio`: mean latency of the default policy; baseline: of computron2023,
the published system, on the same hardware. `.p99_ratio` likewise. `.over_clairvoyant`: baseline knows all requests to
come, evicts and fetches ahead accordingly, brings models as a whole and runs one step of each at a time;
`.over_clairvoyant_default`: the default policy, with all that it does, if it knew them; `.over_told`: if it knew by
what law the arrivals are drawn, each model's rate and their variation, but not when they come; `.over_all_resident`:
memory for all models. A mean is the mean of the seeds' means, a p99 of all their requests together.
`.over_bound`, where requests come at random: baseline is what nobody undercuts who cannot see the future (`least_mean`,
or all models resident); `.bound_over_clairvoyant`: how far that is from who can.
`.published`: the published mean of one run; baseline: that of computron2023 as the published client would have measured
it, whose arrivals are not quite those that it drew (`sent` in presets.py); ratio: simulated / published. `.lowest` and
`.highest`: the range of the seeds.
`reproduction.*`: in how many cells the published mean lies in that range; the geometric mean of simulated / published;
the same if the engine did not sleep for 100 ms where it finds a worker's inbox full, but looked again every 10 ms.
`experiment1.{tp}x{pp}.response`: the mean response of experiment 1 with the constants of 2x2; baseline: published.
`without.{part}.cv{cv}`: how many times as long the default policy takes without one of its parts, geometric mean over
the cells; `worst` over all of them.
`generations.{way}.mean`, `.p99`: how many times as long others take, or the default policy without a part, where models
generate (`_generations.py`), geometric mean of three workloads. Without seniority, the younger may interrupt the older.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from _cells import ABLATIONS, TOLD, WITHOUT, Measured, least_mean, measure
from _common import Report, arguments
from _generations import WAYS, latencies
from rich.console import Console
from rich.table import Table

from computron.simulation.presets import EXPERIMENT_1, EXPERIMENT_2

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "default",
    "computron2023",
    "lru",
    "one-at-a-time",
    "all-resident",
    TOLD,
    "clairvoyant",
    "clairvoyant-prefetch",
    "clairvoyant-default",
)
FORESEEING, STRICTEST = "clairvoyant-prefetch", "clairvoyant-default"
BOUND = "bound_over_clairvoyant"
SEEDS, QUICK_SEEDS = 40, 3
GENERATION_SEEDS = 8
CVS = (0.25, 1.0, 4.0)
PARTS = tuple(system.name.removeprefix(WITHOUT) for system in ABLATIONS)
PER_CELL = (
    *("mean_ratio", "p99_ratio", "over_clairvoyant", "over_clairvoyant_default", "over_told", "over_all_resident"),
    *("published", "lowest", "highest"),
)
NAMES = (
    *(f"cells.{cell.name}.{row}" for cell in EXPERIMENT_2 for row in PER_CELL),
    *(f"cells.{cell.name}.{row}" for cell in EXPERIMENT_2 if cell.cv == 1.0 for row in ("over_bound", BOUND)),
    "reproduction.cells_inside",
    "reproduction.geometric_mean",
    "reproduction.sleepless",
    *(f"experiment1.{run.name}.response" for run in EXPERIMENT_1),
    *(f"generations.{way}.{row}" for way in WAYS if way != "default" for row in ("mean", "p99")),
    *(f"without.{part}.{row}" for part in PARTS for row in (*(f"cv{cv:g}" for cv in CVS), "worst")),
)


def main() -> None:
    options = arguments(__doc__ or "", _flags)
    seeds = range(options.seed, options.seed + (QUICK_SEEDS if options.quick else options.seeds))
    cells = measure((*COLUMNS, *(system.name for system in ABLATIONS)), seeds, options.jobs)
    report = Report("Workloads of experiment 2, simulated", options, NAMES)
    for cell in cells:
        _add_cell(report, cell)
    _add_reproduction(report, cells)
    for run in EXPERIMENT_1:
        response = statistics.fmean(run.responses())
        report.row(f"experiment1.{run.name}.response", response, "s", run.published, response / run.published)
    _add_ablation(report, cells)
    _add_generations(report, seeds)
    report.plot(lambda axes: _draw(axes, cells))
    _print_means(cells, COLUMNS)
    _print_reproduction(cells)
    report.finish()


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of each cell; default: {SEEDS}")
    parser.add_argument("--jobs", type=int, default=2, help="processes; they change no figure; default: 2")


def _add_cell(report: Report, cell: Measured) -> None:
    name = f"cells.{cell.cell.name}"
    mean, p99 = cell.mean("default"), cell.p99("default")
    for row, other in (
        ("mean_ratio", "computron2023"),
        ("over_clairvoyant", FORESEEING),
        ("over_clairvoyant_default", STRICTEST),
        ("over_told", TOLD),
        ("over_all_resident", "all-resident"),
    ):
        baseline = cell.mean(other)
        report.row(f"{name}.{row}", mean, "s", baseline, mean / baseline)
    least = least_mean(cell.cell)
    if least is not None:
        bound = max(least, cell.mean("all-resident"))
        report.row(f"{name}.over_bound", mean, "s", bound, mean / bound)
        report.row(f"{name}.{BOUND}", bound, "s", cell.mean(FORESEEING), bound / cell.mean(FORESEEING))
    baseline = cell.p99("computron2023")
    report.row(f"{name}.p99_ratio", p99, "s", baseline, p99 / baseline)
    simulated, published = statistics.fmean(cell.reproduced), cell.cell.published
    report.row(f"{name}.published", published, "s", simulated, simulated / published)
    for row, value in (("lowest", min(cell.reproduced)), ("highest", max(cell.reproduced))):
        report.row(f"{name}.{row}", value, "s", published, value / published)


def _add_reproduction(report: Report, cells: Sequence[Measured]) -> None:
    inside = sum(map(is_inside, cells))
    report.row("reproduction.cells_inside", inside, f"of {len(cells)}", None, inside / len(cells))
    for row, means in (
        ("geometric_mean", [cell.reproduced for cell in cells]),
        ("sleepless", [cell.sleepless for cell in cells]),
    ):
        ratios = (statistics.fmean(mean) / cell.cell.published for mean, cell in zip(means, cells, strict=True))
        mean = statistics.geometric_mean(ratios)
        report.row(f"reproduction.{row}", mean, "times", None, mean)


def is_inside(cell: Measured) -> bool:
    """Does the published mean lie in the range of the seeds' means?"""
    return min(cell.reproduced) <= cell.cell.published <= max(cell.reproduced)


def _add_ablation(report: Report, cells: Sequence[Measured]) -> None:
    for part in PARTS:
        slower = {cell.cell: cell.mean(WITHOUT + part) / cell.mean("default") for cell in cells}
        for cv in CVS:
            ratio = statistics.geometric_mean(ratio for cell, ratio in slower.items() if cell.cv == cv)
            report.row(f"without.{part}.cv{cv:g}", ratio, "times", None, ratio)
        report.row(f"without.{part}.worst", max(slower.values()), "times", None, max(slower.values()))


def _add_generations(report: Report, seeds: range) -> None:
    samples = {way: latencies(way, seeds[:GENERATION_SEEDS]) for way in WAYS}
    ours = samples.pop("default")
    for way, others in samples.items():
        for row, figure in (("mean", np.mean), ("p99", lambda sample: np.percentile(sample, 99))):
            ratios = [float(figure(other) / figure(our)) for our, other in zip(ours, others, strict=True)]
            ratio = statistics.geometric_mean(ratios)
            report.row(f"generations.{way}.{row}", ratio, "times", None, ratio)


def _print_means(cells: Sequence[Measured], systems: Iterable[str]) -> None:
    table = Table(title="Mean latency in seconds, same arrivals for all", title_justify="left")
    table.add_column("cell")
    for column in ("published", *systems):
        table.add_column(column, justify="right")
    for cell in cells:
        means = (f"{cell.mean(system):.3f}" for system in systems)
        table.add_row(cell.cell.name, f"{cell.cell.published:.3f}", *means)
    Console(width=160).print(table)


def _print_reproduction(cells: Sequence[Measured]) -> None:
    """The published figure is one run without a seed: it should lie in the range of runs that differ in the seed."""
    for cell in cells:
        if is_inside(cell):
            continue
        low, high, published = min(cell.reproduced), max(cell.reproduced), cell.cell.published
        off = low / published if published < low else high / published
        print(f"{cell.cell.name}: published {published:.3f} s, simulated {low:.3f} to {high:.3f} s ({off - 1:+.0%})")
    print("docs/benchmarks.md says what is known of the reasons.")


def _draw(axes: Axes, cells: Sequence[Measured]) -> None:
    places = range(len(cells))
    for system in ("default", "lru", "all-resident", STRICTEST):
        ratios = [cell.mean(system) / cell.mean("computron2023") for cell in cells]
        axes.plot(places, ratios, "o", label=system)
    axes.set_xticks(places, [cell.cell.name for cell in cells], rotation=90, fontsize=6)
    axes.set_ylabel("mean latency / computron2023")
    axes.set_ylim(0, math.ceil(10 * axes.get_ylim()[1]) / 10)
    axes.legend()


if __name__ == "__main__":
    main()
