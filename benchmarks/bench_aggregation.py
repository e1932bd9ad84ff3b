"""What the Parameter Service costs: a step against torch's own optimizer, its transport against memcpy and plain TCP.

`aggregation.step_overhead`: one worker, 25 million parameters, AdamW, shared memory: seconds of `step()`, gradients
being there, until the parameters are the new ones; baseline: torch.optim.AdamW(fused=True) in the same process. Both
compute on one thread. `aggregation.shm_share`: bytes a second of gradients that the agent stages in shared memory;
baseline: memcpy by one thread. `aggregation.tcp_share`: of gradients sent through links over loopback and staged there;
baseline: the same bytes through a plain socket between two processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _common import Report, arguments
from _service import service
from _transport import seconds_over_tcp

WORKER = Path(__file__).parent / "_aggregation_worker.py"
PARAMETERS, QUICK_PARAMETERS = 25_000_000, 4_000_000
ROUNDS, QUICK_ROUNDS = 40, 8
NAMES = ("aggregation.step_overhead", "aggregation.shm_share", "aggregation.tcp_share")


def measured(*words: str) -> dict[str, float]:
    """Medians of what a worker measured."""
    done = subprocess.run([sys.executable, str(WORKER), *words], stdout=subprocess.PIPE, check=True)
    return {name: statistics.median(seconds) for name, seconds in json.loads(done.stdout).items()}


def run(options: argparse.Namespace) -> Report:
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    elements = QUICK_PARAMETERS if options.quick else PARAMETERS
    report = Report("Aggregation", options, NAMES)
    with service(1) as running:
        found = measured("overhead", str(rounds), str(elements), running.url)
    ours, theirs = found["service"], found["torch"]
    report.row("aggregation.step_overhead", ours * 1e3, "ms", theirs * 1e3, ours / theirs)
    found = measured("shared", str(rounds), str(elements))
    gigabytes = elements * 4 / 1e9
    ours, theirs = gigabytes / found["service"], gigabytes / found["memcpy"]
    report.row("aggregation.shm_share", ours, "GB/s", theirs, ours / theirs)
    links, plain = (gigabytes / statistics.median(taken) for taken in seconds_over_tcp(elements, rounds))
    report.row("aggregation.tcp_share", links, "GB/s", plain, links / plain)
    return report


if __name__ == "__main__":
    run(arguments(__doc__)).finish()
