"""What the Parameter Service costs: a step against torch's own optimizer, its transport against memcpy and plain TCP,
and trainings of real models against DistributedDataParallel.

`aggregation.step_overhead`: one worker, 25 million parameters, AdamW, shared memory: seconds of `step()`, gradients
being there, until the parameters are the new ones; baseline: torch.optim.AdamW(fused=True) in the same process. Both
compute on one thread; the agent copies gradients with two. `step_over_bound`: over such a copy and torch's step, which
is the least, as nothing is applied before all is staged. `small_step_us` and `many_step_us` are the same for 72
parameters in 2 tensors and for 144 small tensors. `aggregation.shm_share`: bytes a second of gradients that the agent
stages in shared memory; baseline: memcpy by as many threads. `aggregation.tcp_share`: of gradients sent through links
over loopback and staged there; baseline: the same bytes through a plain socket between two processes.

`aggregation.{model}.*`: two workers train together, with one thread each, by one aggregator that all jobs share.
Compared with an aggregator of the job's own (`over_own`), DistributedDataParallel over gloo with torch's fused
optimizer (`over_ddp`, also the baseline of `step_p99` and `cpu`), and a worker that trains alone, with nobody to
exchange anything with (`over_alone`). `cpu`: seconds of all processes, master included, for a step. The four models
train one after the other; the jobs before stay in their aggregator. `emulated`: four jobs side by side whose GPU is
emulated by sleeping, each with four million parameters; `reserved_cores`: of their aggregators, with a server each as
the baseline. Parameters of the models are compared with those of one process, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from _common import Report, arguments
from _service import Service, service
from _training import Measured, Workers, measured, servers, workers
from _transport import seconds_over_tcp

WORKER = Path(__file__).parent / "_aggregation_worker.py"
PARAMETERS, QUICK_PARAMETERS = 25_000_000, 4_000_000
ROUNDS, QUICK_ROUNDS = 40, 8
SMALL_ROUNDS = 10  # times as many of small steps
MODELS = ("cnn", "lstm", "transformer", "minilm")
JOBS, QUICK_JOBS = 4, 2  # with emulated compute
COMPUTE, QUICK_COMPUTE = 0.2, 0.05  # seconds of a step that are slept
FIGURES = ("step_p50", "step_p99", "cpu", "over_own", "over_ddp", "over_alone")
NAMES = (
    *(
        f"aggregation.{what}"
        for what in ("step_overhead", "step_over_bound", "small_step_us", "many_step_us", "shm_share", "tcp_share")
    ),
    *(f"aggregation.{model}.{figure}" for model in (*MODELS, "emulated") for figure in FIGURES),
    "aggregation.emulated.reserved_cores",
)


@dataclass(frozen=True)
class Ways:
    """The same training in four ways."""

    shared: Measured
    own: Measured
    ddp: Measured
    alone: Measured

    def report(self, report: Report, model: str) -> None:
        shared, ddp = self.shared, self.ddp
        report.row(f"aggregation.{model}.step_p50", shared.p50 * 1e3, "ms")
        report.row(f"aggregation.{model}.step_p99", shared.p99 * 1e3, "ms", ddp.p99 * 1e3, shared.p99 / ddp.p99)
        report.row(f"aggregation.{model}.cpu", shared.cpu * 1e3, "ms", ddp.cpu * 1e3, shared.cpu / ddp.cpu)
        for name, other in (("own", self.own), ("ddp", ddp), ("alone", self.alone)):
            ratio = shared.p50 / other.p50
            report.row(f"aggregation.{model}.over_{name}", shared.p50 * 1e3, "ms", other.p50 * 1e3, ratio)


def medians(*words: str) -> dict[str, float]:
    """Of what a worker measured."""
    done = subprocess.run([sys.executable, str(WORKER), *words], stdout=subprocess.PIPE, check=True)
    return {name: statistics.median(seconds) for name, seconds in json.loads(done.stdout).items()}


def steps_alone(report: Report, running: Service, rounds: int, elements: int) -> None:
    """Of one worker, with nothing but the optimizer in them."""
    found = medians("overhead", str(rounds), str(elements), running.url)
    report.row("aggregation.step_overhead", found["service"] * 1e3, "ms", found["torch"] * 1e3, _ratio(found))
    bound = found["torch"] + found["copy"]
    report.row("aggregation.step_over_bound", found["service"] * 1e3, "ms", bound * 1e3, found["service"] / bound)
    for what in ("small", "many"):
        found = medians(what, str(rounds * SMALL_ROUNDS), "0", running.url)
        report.row(f"aggregation.{what}_step_us", found["service"] * 1e6, "us", found["torch"] * 1e6, _ratio(found))


def transport(report: Report, rounds: int, elements: int) -> None:
    found = medians("shared", str(rounds), str(elements))
    gigabytes = elements * 4 / 1e9
    ours, theirs = gigabytes / found["service"], gigabytes / found["memcpy"]
    report.row("aggregation.shm_share", ours, "GB/s", theirs, ours / theirs)
    links, plain = (gigabytes / statistics.median(taken) for taken in seconds_over_tcp(elements, rounds))
    report.row("aggregation.tcp_share", links, "GB/s", plain, links / plain)


def trained(team: Workers, model: str, shared: Service, own: Service, steps: dict[str, int]) -> Ways:
    team.do("reference", count=1, model=model, steps=steps["warm_up"])
    alone = measured(team.do("alone", count=1, model=model, steps=steps))
    ddp = measured(team.do("ddp", model=model, steps=steps))
    by_own = team.do("service", model=model, steps=steps, master=own.url, stay=False, pids=servers(own))
    by_shared = team.do("service", model=model, steps=steps, master=shared.url, stay=True, pids=servers(shared))
    return Ways(measured(by_shared), measured(by_own), ddp, alone)


def emulated(team: Workers, shared: Service, own: Sequence[Service], steps: dict[str, int], compute: float) -> Ways:
    def by(mode: str, masters: Sequence[Service | None], *, count: int = 2) -> Measured:
        used = {id(one): one for one in masters if one is not None}
        pids = [pid for one in used.values() for pid in servers(one)]
        urls = ["" if one is None else one.url for one in masters]
        order = {"mode": mode, "masters": urls, "compute": compute, "steps": steps}
        return measured(team.do("emulated", count=count, pids=pids, **order))

    nobody = [None] * len(own)
    alone, ddp = by("alone", nobody, count=1), by("ddp", nobody)
    return Ways(by("service", [shared] * len(own)), by("service", own), ddp, alone)


def run(options: argparse.Namespace) -> Report:
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    elements = QUICK_PARAMETERS if options.quick else PARAMETERS
    steps = {"warm_up": 3, "measured": 5} if options.quick else {"warm_up": 10, "measured": 100}
    report = Report("Aggregation", options, NAMES)
    transport(report, rounds, elements)
    with ExitStack() as stack:
        shared = stack.enter_context(service(1))
        steps_alone(report, shared, rounds, elements)
        own = [stack.enter_context(service(1)) for _ in range(QUICK_JOBS if options.quick else JOBS)]
        team = stack.enter_context(workers())
        for model in MODELS:
            trained(team, model, shared, own[0], steps).report(report, model)
        team.do("leave")
        compute = QUICK_COMPUTE if options.quick else COMPUTE
        emulated(team, shared, own, steps, compute).report(report, "emulated")
        report.row("aggregation.emulated.reserved_cores", 1, "cores", len(own), 1 / len(own))
    return report


def _ratio(found: dict[str, float]) -> float:
    return found["service"] / found["torch"]


if __name__ == "__main__":
    run(arguments(__doc__)).finish()
