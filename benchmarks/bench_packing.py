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

Without --trace, --quick replays synthetic jobs, whose figures mean nothing. `--device` changes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _packing_trace
from _common import Report, arguments

from computron.parameter_service.simulation.trace import read_gavel

QUICK_JOBS = 150
NAMES = _packing_trace.NAMES


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, metavar="FILE", help="gavel_msr_seed0.trace; required but for --quick")
    parser.add_argument("--throughputs", type=Path, metavar="FILE", help="gavel_throughputs.json; with --trace")
    parser.add_argument("--jobs", type=int, default=2, help="processes; they change no figure; default: 2")


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__ or "", flags, argv)
    if (options.trace is None) != (options.throughputs is None):
        raise SystemExit("--trace and --throughputs belong together")
    if options.trace is None and not options.quick:
        raise SystemExit("give the trace with --trace FILE and --throughputs FILE, or try --quick")
    if options.trace is None:
        jobs = _packing_trace.synthetic(options.seed)
    else:
        jobs = read_gavel(options.trace, options.throughputs)
    if options.quick:
        jobs = jobs[:QUICK_JOBS]
    report = Report("Packing training jobs on aggregators", options, NAMES)
    _packing_trace.measure(report, jobs, quick=options.quick, seed=options.seed, processes=options.jobs)
    report.finish()


if __name__ == "__main__":
    main()
