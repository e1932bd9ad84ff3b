"""Random deaths: aggregators, the master and workers of a training job are killed (-9) at random moments, migrations
included, and the job goes on.

Rows: `faults.kills`; `faults.{aggregator,master,worker}.recovery`, the longest time from such a kill until the master
has dealt with it and all workers have taken another step (a worker's successor has its imports done, the master is
started again at once, as whoever watches it would); `faults.lost_steps`, the most that one kill cost, and its share of
`--every`, the steps that the job allows; `faults.wrong_parameters`, how many differ at the end from those of one
process without faults (none may); `faults.loss`, the last, against that of the same process.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import subprocess
import sys
import time
import urllib.error
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from _common import Report, arguments
from _fault_worker import NEVER, PROGRESS, TARGET, WORKERS, mapped, reference
from _service import Service, service

WORKER = Path(__file__).parent / "_fault_worker.py"
AGGREGATORS = 3
KILLS, QUICK_KILLS = 200, 6
EVERY = 10
PAUSE = 0.005  # seconds that a worker's compute takes longer: kills hit all phases of a step
QUIET = 0.6  # seconds: the longest time between a recovery and the next kill
AFTERWARDS = 100  # steps that are taken when all kills are done
LONGEST = 60.0  # seconds after which a job that does not go on counts as stuck
JOB = "/v1/jobs/faults"
TARGETS = ("aggregator", "aggregator", "worker", "master")
NAMES = (
    "faults.kills", *(f"faults.{target}.recovery" for target in sorted(set(TARGETS))), "faults.lost_steps",
    "faults.wrong_parameters", "faults.loss",
)  # fmt: skip


class Training:
    """The job's workers, and one that waits to take a dead one's place."""

    def __init__(self, running: Service, every: int, least: int) -> None:
        self.folder = running.folder
        (self.folder / "target").write_bytes(TARGET.pack(NEVER))
        for rank in range(WORKERS):
            (self.folder / f"progress-{rank}").write_bytes(bytes(PROGRESS.size))
        self._words = [sys.executable, str(WORKER), running.url, str(self.folder), str(every), str(PAUSE), str(least)]
        self.workers = [self._spare() for _ in range(WORKERS)]
        for rank, worker in enumerate(self.workers):
            self._begin(worker, rank)
        self._next = self._spare()

    def progress(self) -> list[tuple[int, int, float]]:
        """Steps, lost steps and loss of each worker."""
        return [PROGRESS.unpack((self.folder / f"progress-{rank}").read_bytes()) for rank in range(WORKERS)]

    def replace(self, rank: int) -> None:
        """Kill the worker of this rank; another goes on in its place."""
        dead, self.workers[rank] = self.workers[rank], self._next
        dead.kill()
        self._begin(self._next, rank)
        dead.communicate()
        self._next = self._spare()

    def spare_is_ready(self) -> bool:
        """Its imports are done."""
        return bool(select.select([self._next.stdout], [], [], 0)[0])

    def require_alive(self) -> None:
        for rank, worker in enumerate(self.workers):
            if worker.poll() is not None:
                said = (self.folder / "workers").read_text()[-3000:]
                raise RuntimeError(f"the worker of rank {rank} ended with {worker.returncode}:\n{said}")

    def end(self) -> int:
        """Let the workers end together; returns the last step."""
        last = max(steps for steps, _, _ in self.progress()) + AFTERWARDS
        with mapped(self.folder / "target", TARGET.size) as target:
            TARGET.pack_into(target, 0, last)
        for worker in self.workers:
            if worker.wait(LONGEST):
                self.require_alive()
        return last

    def stop(self) -> None:
        for worker in (*self.workers, self._next):
            worker.kill()
            worker.communicate()

    def _spare(self) -> subprocess.Popen[str]:
        with (self.folder / "workers").open("ab") as said:
            return subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)

    def _begin(self, worker: subprocess.Popen[str], rank: int) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError(f"a worker did not start:\n{(self.folder / 'workers').read_text()[-3000:]}")
        worker.stdin.write(f"{rank}\n")
        worker.stdin.flush()


def kill(target: str, running: Service, training: Training, chance: random.Random) -> Callable[[], bool]:
    """Half of the time while all blocks of the job are being moved. Returns what tells whether the master has dealt
    with it.
    """
    up = [one for one in running.aggregators() if one["jobs"] or chance.random() < 0.2] or running.aggregators()
    epoch = running.get(JOB)["epoch"]
    if chance.random() < 0.5 and len(running.aggregators()) > 1:
        to = chance.choice([one["id"] for one in running.aggregators()])
        try:
            running.post(f"{JOB}/move", {"blocks": "all", "to": to})
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise
            error.close()  # it has just died, or has all blocks
        time.sleep(chance.uniform(0, 0.02))
    if target == "aggregator":
        dead = chance.choice(up)["pid"]
        os.kill(dead, signal.SIGKILL)
        return lambda: dead not in {one["pid"] for one in running.aggregators()} and is_whole(running)
    if target == "master":
        running.master.kill()
        running.master.wait()
        running.start()
        return lambda: is_whole(running)
    training.replace(chance.randrange(WORKERS))
    return lambda: running.get(JOB)["epoch"] > epoch and is_whole(running)


def is_whole(running: Service) -> bool:
    """Whether the job runs, with all its workers, on aggregators that are there."""
    job = running.get(JOB)
    here = {one["id"] for one in running.aggregators()}
    return job["state"] == "running" and len(job["connected_workers"]) == WORKERS and set(job["aggregators"]) <= here


def recovered(training: Training, running: Service, since: float, dealt_with: Callable[[], bool]) -> float:
    """Seconds from `since` until it was dealt with and every worker has taken a step after that."""

    def require_time() -> None:
        training.require_alive()
        if time.monotonic() - since > LONGEST:
            said = (training.folder / "workers").read_text()[-3000:]
            raise RuntimeError(f"the job did not go on:\n{running.said()}\n{said}\n{running.get(JOB)}")

    while not dealt_with():
        require_time()
        time.sleep(0.01)
    last = [steps for steps, _, _ in training.progress()]
    while any(steps == before for (steps, _, _), before in zip(training.progress(), last, strict=True)):
        require_time()
        time.sleep(0.002)
    return time.monotonic() - since


def run(options: argparse.Namespace) -> Report:
    report = Report("Faults", options, NAMES)
    kills = options.kills or (QUICK_KILLS if options.quick else KILLS)
    chance = random.Random(options.seed)
    longest: defaultdict[str, float] = defaultdict(float)
    most_lost = 0
    with service(AGGREGATORS, "--hysteresis", "1h", memory="64MiB") as running:
        training = Training(running, options.every, WORKERS)
        try:
            recovered(training, running, time.monotonic(), lambda: True)
            for number in range(kills):
                target = TARGETS[number] if number < len(TARGETS) else chance.choice(TARGETS)
                time.sleep(chance.uniform(0, QUIET))
                running.until(lambda: len(running.aggregators()) >= 2 and training.spare_is_ready())
                lost = [lost for _, lost, _ in training.progress()]
                since = time.monotonic()
                dealt_with = kill(target, running, training, chance)
                longest[target] = max(longest[target], recovered(training, running, since, dealt_with))
                after = [lost for _, lost, _ in training.progress()]  # a new worker's is 0; the other one knows
                most_lost = max(most_lost, *(now - before for now, before in zip(after, lost, strict=True)))
            last = training.end()
            found = [torch.load(running.folder / f"parameters-{rank}.pt") for rank in range(WORKERS)]
            loss = training.progress()[0][2]
        finally:
            training.stop()
    network, expected_loss = reference(last)
    expected = network.state_dict()
    wrong = sum(int((mine[name] != value).sum()) for mine in found for name, value in expected.items())
    report.row("faults.kills", kills, "")
    for target in sorted(longest):
        report.row(f"faults.{target}.recovery", longest[target], "s")
    report.row("faults.lost_steps", most_lost, "steps", options.every, most_lost / options.every)
    report.row("faults.wrong_parameters", wrong, "", sum(value.numel() for value in expected.values()))
    report.row("faults.loss", loss, "", expected_loss, loss / expected_loss)
    return report


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, help=f"default: {KILLS}")
    parser.add_argument("--every", type=int, default=EVERY, help=f"steps between snapshots; default: {EVERY}")


if __name__ == "__main__":
    run(arguments(__doc__, extend)).finish()
