"""How many aggregators do training jobs need that share them, and what do the jobs lose by it?

Trace (`gavel_msr_seed0.trace` of stanford-futuredata/gavel, Narayanan et al., OSDI 2020): 2,000 training jobs that come
and go over ten weeks, through both packers, against an aggregator of its own for every job. Simulated: an iteration is
the traced one on V100s, then the aggregation, whose time is that of torch's fused kernels on one core of a Xeon.

`packing.trace.reserved_ratio`: core hours reserved, packer `utilisation`, against a server per job, loss limit 0.1;
`.cyclic_*`: the same for the packer `cyclic`; `.limit_{limit}.*`: with other limits.
`.over_bound`: against as many whole cores as the work needs at each moment if nobody waits; `.bound_ratio`: that bound
against a server per job; `.unrounded_bound_ratio`: with parts of cores; `.two_per_job_ratio`: against two servers per
job, as in the paper. `.cpu_ratio`: CPU seconds, which packing does not change.
`.worst_loss`: largest that was predicted for any job at any moment; `.mean_loss`: of the jobs' lives; `.simulated_*`:
what the jobs lose in an event simulation of the aggregators, at moments of the replay, with 2 % jitter;
`.simulated_over_limit`: share of jobs and moments at which that is more than the limit; `.moves_per_job`: blocks.

Live (`_packing_jobs.py` says where the shapes are from): jobs whose compute is emulated (they sleep) train on the real
service, whose master decides by itself on how many aggregators; in turn with an aggregator for each, in the same run.
`packing.{2,3,4}jobs.{shape}.aggregators`: as many as ran when the master had settled, for so many equal jobs; baseline:
AutoPS's (arXiv 2204.03211), whose jobs would have two parameter servers each. `.loss`, `.worst_loss`: of step time
against an aggregator each, mean and largest of the jobs; baseline: 0.05. `packing.mixed.*`: 8 unlike jobs;
`.reserved_ratio` against 8 aggregators; `.cpu_ratio`: CPU seconds of all aggregators in a second.

Without --trace, --quick replays synthetic jobs, whose figures mean nothing, and runs few live ones. `--device` changes
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _packing_live
import _packing_trace
from _common import Report, arguments

from computron.parameter_service.simulation.trace import read_gavel

QUICK_JOBS = 150
PARTS = ("trace", "equal", "mixed")
QUICK_PARTS = PARTS[:2]


def names(parts: Sequence[str], *, quick: bool) -> list[str]:
    of = {
        "trace": _packing_trace.NAMES,
        "equal": _packing_live.equal_names(quick=quick),
        "mixed": _packing_live.MIXED_NAMES,
    }
    return [name for part in parts for name in of[part]]


NAMES = tuple(names(PARTS, quick=False))


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, metavar="FILE", help="gavel_msr_seed0.trace; required but for --quick")
    parser.add_argument("--throughputs", type=Path, metavar="FILE", help="gavel_throughputs.json; with --trace")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--jobs", type=int, default=2, help="processes; they change no figure; default: 2")


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__ or "", flags, argv)
    if (options.trace is None) != (options.throughputs is None):
        raise SystemExit("--trace and --throughputs belong together")
    parts = (QUICK_PARTS if options.quick else PARTS) if options.part is None else (options.part,)
    if "trace" in parts and options.trace is None and not options.quick:
        raise SystemExit("give the trace with --trace FILE and --throughputs FILE, or try --quick, or another --part")
    report = Report("Packing training jobs on aggregators", options, names(parts, quick=options.quick))
    if "trace" in parts:
        replay(report, options)
    if "equal" in parts:
        _packing_live.measure_equal(report, quick=options.quick, seed=options.seed)
    if "mixed" in parts:
        _packing_live.measure_mixed(report, seed=options.seed)
    report.finish()


def replay(report: Report, options: argparse.Namespace) -> None:
    if options.trace is None:
        jobs = _packing_trace.synthetic(options.seed)
    else:
        jobs = read_gavel(options.trace, options.throughputs)
    if options.quick:
        jobs = jobs[:QUICK_JOBS]
    _packing_trace.measure(report, jobs, quick=options.quick, seed=options.seed, processes=options.jobs)


if __name__ == "__main__":
    main()
