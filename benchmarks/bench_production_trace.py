"""How many GPUs does a production service with many checkpoints need, with and without swapping?

GenTD26 (`gentd26_requests.csv` of alibaba/clusterdata, Lin et al., SoCC 2025): two weeks of image generation. Its
checkpoints are models of 2 to 7 GB (log-uniform, by --seed) on groups of one GPU with 40 GB and a link of 25 GB/s; one
image at a time. Arrivals and execution times are divided by 20, 100 and 400, from image generation to small language
models; the days of the trace are laid over each other for 4 and 8 times the rate. A request is in time if it is
answered within twice its execution time + 2 s (the 2 s are not divided).

`trace.f{factor}.x{rate}.gpus_{policy}`: the smallest number of GPUs with which 99 % of the requests are in time.
default: behind the router `resident`; its ratio is to all_resident.
computron2023: behind `least-loaded`; its baseline is default, and its ratio default / computron2023.
all_resident: every model on every GPU, behind `least-loaded`: what is left to wait for without any swapping.
all_resident_by_work: the same behind `resident`, which then balances by work: the bound of what default can reach.
gpu_per_model: every model has GPUs of its own; its baseline is default, and its ratio default / gpu_per_model.
lru (with --lru): behind `least-loaded`.

Without --trace, --quick replays synthetic requests, whose figures mean nothing. The simulated device is the same on any
machine; `--device` changes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import _trace_replay as replayed
from _common import Report, arguments
from _trace_replay import MAX_GPUS, SHARE, Search

from computron.simulation.traces import read_gentd26
from computron.simulation.workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = (20, 100, 400)
RATES = (1, 4, 8)
ROUTED = {
    "all_resident": ("all-resident", "least-loaded"),
    "all_resident_by_work": ("all-resident", "resident"),
    "default": ("default", "resident"),
    "computron2023": ("computron2023", "least-loaded"),
    "lru": ("lru", "least-loaded"),
}
STYLES = {
    "all_resident": "ks--",
    "all_resident_by_work": "k+:",
    "default": "C1o-",
    "computron2023": "C2v-",
    "lru": "C0^-",
}
POLICIES = ("default", "computron2023", "all_resident", "gpu_per_model")


def names(factors: Iterable[int], rates: Iterable[int]) -> tuple[str, ...]:
    cells = [f"trace.f{factor}.x{rate}" for factor in factors for rate in rates]
    return tuple(f"{cell}.{row}" for cell in cells for row in (*(f"gpus_{name}" for name in POLICIES), "longest_wait"))


NAMES = names(FACTORS, RATES)


@dataclass(frozen=True, slots=True)
class Task:
    trace: Workload
    factor: int
    rate: int
    policies: tuple[str, ...]
    seed: int
    max_wait: float


@dataclass(frozen=True, slots=True)
class Cell:
    factor: int
    rate: int
    searches: dict[str, Search]
    own_gpus: int
    own_attainment: float
    wait_bound: float
    seconds: float


def work_on(task: Task) -> Cell:
    """All systems on one factor and rate; each search begins where all models resident are enough."""
    began = time.monotonic()
    workload = replayed.replay(task.trace, task.factor, task.rate)
    mean = sum(arrival.seconds or 0.0 for arrival in workload.arrivals) / len(workload.arrivals)
    models = replayed.checkpoints(task.trace, mean, task.seed)
    searches: dict[str, Search] = {}
    guess = task.rate
    for policy in task.policies:
        system, router = ROUTED[policy]
        search = searches[policy] = Search()
        search.run(lambda gpus, s=system, r=router: replayed.play(workload, models, s, r, gpus, task.max_wait), guess)
        guess = searches["all_resident"].needed or MAX_GPUS
    own_gpus, own_attainment = replayed.gpu_per_model(workload)
    bound = replayed.wait_bound(workload, models, task.max_wait)
    return Cell(task.factor, task.rate, searches, own_gpus, own_attainment, bound, time.monotonic() - began)


def work_off(tasks: list[Task], jobs: int) -> Iterator[Cell]:
    """As they come to an end."""
    if jobs == 1:
        yield from map(work_on, tasks)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(work_on, tasks)


def report_cell(report: Report, cell: Cell) -> None:
    place = f"trace.f{cell.factor}.x{cell.rate}"
    needed = {policy: search.needed for policy, search in cell.searches.items()}
    gpus = {policy: float(MAX_GPUS + 1 if count is None else count) for policy, count in needed.items()}
    unit = {
        policy: "GPUs" if count is not None else f"GPUs or more (over {MAX_GPUS})" for policy, count in needed.items()
    }
    bound, ours = gpus["all_resident"], gpus["default"]
    report.row(f"{place}.gpus_all_resident", bound, unit["all_resident"])
    report.row(f"{place}.gpus_default", ours, unit["default"], bound, ours / bound)
    for policy in gpus:
        if policy in ("all_resident", "default"):
            continue
        report.row(f"{place}.gpus_{policy}", gpus[policy], unit[policy], ours, ours / gpus[policy])
    report.row(f"{place}.gpus_gpu_per_model", cell.own_gpus, "GPUs", ours, ours / cell.own_gpus)
    report.row(f"{place}.one_gpu_per_model", cell.own_attainment, "in time", SHARE, cell.own_attainment / SHARE)
    runs = cell.searches["default"].played
    waits = {count: played.longest_wait for count, played in runs.items()}
    enough = needed["default"] or MAX_GPUS
    report.row(f"{place}.longest_wait", waits[enough], "s", cell.wait_bound, waits[enough] / cell.wait_bound)
    worst = max(waits.values())
    report.row(f"{place}.longest_wait_of_all_runs", worst, "s", cell.wait_bound, worst / cell.wait_bound)


def draw(cells: list[Cell], axes: Axes) -> None:
    """A picture for each factor and rate: attainment against GPUs, as far as it was tried.

    Its title says how many are enough if every model has its own.
    """
    figure = axes.figure
    figure.suptitle(axes.get_title())
    axes.remove()
    figure.set_size_inches(11, 9)
    rates = sorted({cell.rate for cell in cells})
    factors = sorted({cell.factor for cell in cells})
    grid = figure.subplots(len(factors), len(rates), squeeze=False, sharey=True)
    for cell in cells:
        small = grid[factors.index(cell.factor)][rates.index(cell.rate)]
        for policy, search in cell.searches.items():
            counts = sorted(search.played)
            attained = [search.played[count].attainment for count in counts]
            small.plot(counts, attained, STYLES[policy], markersize=4, markerfacecolor="none", label=policy)
        small.axhline(SHARE, color="grey", linewidth=0.8, linestyle=":")
        small.set_title(f"factor {cell.factor}, rate x{cell.rate} (GPU per model: {cell.own_gpus})", fontsize=9)
        small.xaxis.get_major_locator().set_params(integer=True)
        small.set_ylim(0.0, 1.02)
    for small in grid[-1]:
        small.set_xlabel("GPUs")
    for row in grid:
        row[0].set_ylabel("share in time")
    grid[0][0].legend(fontsize=8)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, metavar="FILE", help="gentd26_requests.csv; required but for --quick")
    parser.add_argument("--factors", type=int, nargs="+", choices=FACTORS, default=FACTORS)
    parser.add_argument("--rates", type=int, nargs="+", choices=RATES, default=RATES)
    parser.add_argument("--lru", action="store_true", help="simulate lru as well")
    parser.add_argument("--max-wait", type=float, default=30.0, metavar="SECONDS", help="default: 30")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__ or "", flags, argv)
    if options.trace is None and not options.quick:
        raise SystemExit("give the trace with --trace FILE, or try --quick")
    if options.quick:
        options.rates = options.rates[:1]
    trace = read_gentd26(options.trace) if options.trace is not None else replayed.synthetic(options.seed)
    policies = tuple(policy for policy in ROUTED if policy != "lru" or options.lru)
    tasks = [
        Task(trace, factor, rate, policies, options.seed, options.max_wait)
        for rate in sorted(options.rates, reverse=True)  # the longest first
        for factor in sorted(options.factors, reverse=True)
    ]
    report = Report(f"GPUs for {trace.name}", options, names(options.factors, options.rates))
    cells = []
    for cell in work_off(tasks, options.jobs):
        cells.append(cell)
        print(f"factor {cell.factor}, rate x{cell.rate}: {cell.seconds:.0f} s", flush=True)
    cells.sort(key=lambda cell: (cell.factor, cell.rate))
    for cell in cells:
        report_cell(report, cell)
    report.plot(partial(draw, cells))
    report.finish()


if __name__ == "__main__":
    main()
