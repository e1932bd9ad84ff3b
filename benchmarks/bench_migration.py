"""A whole job is moved from one aggregator to another while it trains: by how much is a step longer?

The job has 400 MB of parameters and 800 MB of AdamW state (--megabytes), one worker, and two aggregators that hand it
to and fro. Its compute is emulated: 100 ms of sleep a step, spread over the layers, each of which gives a gradient.

Rows: `migration.exposed_ms`, by how much the longest step during a move and right after it is longer than the median
step that nothing was moved in (median of the moves; `worst_exposed_ms`: the worst), against the same of as many steps
in which nothing was moved (`migration.still_ms`: what noise alone makes of it); `migration.seconds`, from the order
until the master has logged the last block's new owner. `migration.tcp.*`: the same where no memory is shared.
`migration.restart_ms`, the baseline: how long the job stands still if it is stopped, saved, loaded and started again
(with torch's own optimizer; the file is in the page cache).

With --soak instead: 1,000 moves of random blocks to random aggregators, three of them, while two jobs of two workers
train, one through shared memory and one by TCP: `migration.soak.moves` and `migration.soak.wrong_parameters`, how many
parameters then differ from those of one process (none may).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _common import Report, arguments
from _fault_worker import NEVER, TARGET, WORKERS, mapped, reference
from _moving_worker import COMPUTE, JOB, MOMENT
from _service import RefusedError, Service, service

from computron.parameter_service.wire.machine import SHARED_VARIABLE

WORKER = Path(__file__).parent / "_moving_worker.py"
MEGABYTES, QUICK_MEGABYTES = 400, 40  # of parameters
MOVES, QUICK_MOVES = 10, 3
STILL = 6  # steps between two moves
AFTER = 2  # steps after a move that count as its own: the new owner does them for the first time
LONGEST = 120.0  # seconds that anything may take
SOAK_MOVES, QUICK_SOAK_MOVES = 1000, 40
SOAK_AGGREGATORS = 3
SOAK_JOBS = ("shared", "tcp")
WAITED_FOR = 0.7  # share of the moves that the next is ordered after, not while it goes on
AFTERWARDS = 20  # steps when all moves are done
ROWS = ("exposed_ms", "worst_exposed_ms", "still_ms", "seconds")
NAMES = (*(f"migration.{way}{row}" for way in ("", "tcp.") for row in ROWS), "migration.restart_ms")
SOAK_NAMES = ("migration.soak.moves", "migration.soak.wrong_parameters")


class Steps:
    """The moments at which an emulated job's steps ended."""

    def __init__(self, folder: Path, worker: subprocess.Popen[bytes]) -> None:
        self._path, self._worker = folder / "steps", worker

    def moments(self) -> list[float]:
        data = self._path.read_bytes() if self._path.exists() else b""
        return [moment for (moment,) in MOMENT.iter_unpack(data[: len(data) // MOMENT.size * MOMENT.size])]

    def wait(self, count: int, since: float = 0.0) -> None:
        """Until so many steps have ended after that moment."""
        deadline = time.monotonic() + LONGEST
        while sum(moment > since for moment in self.moments()) < count:
            if self._worker.poll() is not None:
                raise RuntimeError(f"the worker ended with {self._worker.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {count} steps within {LONGEST} s")
            time.sleep(0.005)


class Move:
    """began: when it was ordered; logged: when the master had all blocks at their new owner."""

    def __init__(self, began: float, logged: float) -> None:
        self.began, self.logged = began, logged

    def exposed(self, moments: Sequence[float], median: float) -> float:
        """Seconds that the longest of the steps which it touches, and of those right after it, is longer."""
        last = next(place for place, moment in enumerate(moments) if moment > self.logged) + AFTER
        taken = [end - start for start, end in pairwise(moments[: last + 1]) if end > self.began]
        return max(taken) - median


@contextmanager
def alone() -> Iterator[None]:
    """Processes that are started within share no memory."""
    os.environ[SHARED_VARIABLE] = "0"
    try:
        yield
    finally:
        del os.environ[SHARED_VARIABLE]


def move_all(running: Service) -> Move:
    owners = running.get(f"/v1/jobs/{JOB}")["aggregators"]
    names = {one["id"] for one in running.aggregators()}
    to = min(names - owners.keys() or names)
    began = time.monotonic()
    running.post(f"/v1/jobs/{JOB}/move", {"blocks": "all", "to": to})
    running.until(lambda: running.get(f"/v1/jobs/{JOB}")["aggregators"].keys() == {to}, LONGEST)
    return Move(began, time.monotonic())


def measure(elements: int, count: int) -> tuple[list[float], list[float], list[float]]:
    """Of the moves: exposed seconds, and seconds until they were logged. Of as many windows without any: the same
    excess. The first move is not counted: it brings together what was placed on both aggregators.
    """
    with service(2, "--hysteresis", "1h", memory="8GiB") as running:
        command = [sys.executable, str(WORKER), "emulated", running.url, str(running.folder), str(elements)]
        worker = subprocess.Popen(command)
        try:
            steps = Steps(running.folder, worker)
            steps.wait(STILL)
            moves = []
            for _ in range(1 + count):
                moves.append(move_all(running))
                steps.wait(AFTER + STILL, moves[-1].logged)
            moments = steps.moments()
        finally:
            worker.kill()
            worker.wait()
    moves = moves[1:]
    still = []
    for move, following in pairwise([*moves, Move(moments[-1], moments[-1])]):
        after = [moment for moment in moments if moment > move.logged][AFTER:]
        still.append([end - start for start, end in pairwise(after) if end < following.began])
    median = statistics.median(taken for window in still for taken in window)
    exposed = [move.exposed(moments, median) for move in moves]
    quiet = [max(window[: AFTER + 1]) - median for window in still if window]
    return exposed, [move.logged - move.began for move in moves], quiet


def restart(elements: int) -> float:
    """Seconds between two steps of which the second is taken by another process, less a step."""
    with tempfile.TemporaryDirectory(prefix="computron-") as name:
        folder = Path(name)
        command = [sys.executable, str(WORKER), "plain", str(folder), str(elements)]
        worker = subprocess.Popen(command)
        steps = Steps(folder, worker)
        steps.wait(STILL)
        (folder / "stop").touch()
        if worker.wait(LONGEST):
            raise RuntimeError("the worker did not save its checkpoint")
        (folder / "stop").unlink()
        before = steps.moments()
        worker = subprocess.Popen(command)
        try:
            Steps(folder, worker).wait(len(before) + 1)
        finally:
            worker.kill()
            worker.wait()
        moments = steps.moments()
        step = statistics.median(end - start for start, end in pairwise(before[1:]))
        return moments[len(before)] - before[-1] - step


class Learning:
    """A small real job of two workers."""

    def __init__(self, running: Service, name: str) -> None:
        self._running, self.name = running, name
        folder = running.folder
        self._steps = [folder / f"{name}.{rank}" for rank in range(WORKERS)]
        self._target = folder / f"{name}.target"
        self._target.write_bytes(TARGET.pack(NEVER))
        for path in self._steps:
            path.write_bytes(TARGET.pack(0))
        command = [sys.executable, str(WORKER), "learn", running.url, str(folder), name]
        self._workers = [subprocess.Popen([*command, str(rank)]) for rank in range(WORKERS)]

    @property
    def step(self) -> int:
        """That one of its workers has seen."""
        if any(worker.poll() is not None for worker in self._workers):
            raise RuntimeError(f"a worker of {self.name} ended:\n{self._running.said()}")
        return max(int(TARGET.unpack(path.read_bytes())[0]) for path in self._steps)

    @property
    def view(self) -> dict[str, Any]:
        job: dict[str, Any] = self._running.get(f"/v1/jobs/{self.name}")
        return job

    def move(self, chance: random.Random, names: Sequence[str]) -> None:
        """Random blocks to any aggregator; mostly wait until they are there, and sometimes not."""
        count = self.view["blocks"]
        order = {"blocks": chance.sample(range(count), chance.randint(1, count)), "to": chance.choice(names)}
        try:
            self._running.post(f"/v1/jobs/{self.name}/move", order)
        except RefusedError:  # all of them are on their way
            self.settle()
            self._running.post(f"/v1/jobs/{self.name}/move", order)
        if chance.random() < WAITED_FOR:
            self.settle()

    def settle(self) -> None:
        self._running.until(lambda: self.step > 0 and self.view["moving"] == 0)

    def end(self) -> int:
        """Returns how many parameters are not those of one process."""
        self.settle()
        view = self.view
        if view["epoch"] != 1 or not view["migrations"]:
            raise RuntimeError(f"job {self.name} did not just move: {view}\n{self._running.said()}")
        last = self.step + AFTERWARDS
        with mapped(self._target, TARGET.size) as target:
            TARGET.pack_into(target, 0, last)
        if sum(worker.wait(LONGEST) != 0 for worker in self._workers):
            raise RuntimeError(f"a worker of {self.name} failed:\n{self._running.said()}")
        expected = reference(last)[0].state_dict()
        found = [torch.load(self._running.folder / f"{self.name}.{rank}.pt") for rank in range(WORKERS)]
        return sum(int((mine[name] != value).sum()) for mine in found for name, value in expected.items())

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()


def soak(running: Service, moves: int, chance: random.Random) -> int:
    """Returns how many parameters of the two jobs are wrong after so many moves."""
    torch.set_num_threads(1)  # as the workers: sums come in the same order
    jobs = [Learning(running, name) for name in SOAK_JOBS]
    try:
        running.until(lambda: all(job.step > 0 for job in jobs))
        names = [one["id"] for one in running.aggregators()]
        for _ in range(moves):
            chance.choice(jobs).move(chance, names)
        return sum(job.end() for job in jobs)
    finally:
        for job in jobs:
            job.stop()


def run_soak(options: argparse.Namespace) -> Report:
    report = Report("Soak of migrations", options, SOAK_NAMES)
    moves = QUICK_SOAK_MOVES if options.quick else SOAK_MOVES
    with service(SOAK_AGGREGATORS, "--hysteresis", "1h", memory="64MiB") as running:
        wrong = soak(running, moves, random.Random(options.seed))
    report.row("migration.soak.moves", moves, "")
    report.row("migration.soak.wrong_parameters", wrong, "")
    return report


def run(options: argparse.Namespace) -> Report:
    report = Report("Migration", options, NAMES)
    megabytes = options.megabytes or (QUICK_MEGABYTES if options.quick else MEGABYTES)
    count = QUICK_MOVES if options.quick else MOVES
    elements = megabytes * 1_000_000 // 4
    print(
        f"{megabytes} MB of parameters, {2 * megabytes} MB of AdamW state; {COMPUTE * 1000:.0f} ms of emulated compute"
    )
    stopped = restart(elements)
    ways = {"": measure(elements, count)}
    with alone():
        ways["tcp."] = measure(elements, count)
    for way, (exposed, seconds, still) in ways.items():
        quiet, longest = statistics.median(still), max(still)
        median, worst = statistics.median(exposed), max(exposed)
        report.row(f"migration.{way}exposed_ms", median * 1000, "ms", stopped * 1000, median / stopped)
        report.row(f"migration.{way}worst_exposed_ms", worst * 1000, "ms", longest * 1000)
        report.row(f"migration.{way}still_ms", quiet * 1000, "ms")
        report.row(f"migration.{way}seconds", statistics.median(seconds), "s")
    report.row("migration.restart_ms", stopped * 1000, "ms")
    return report


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, help=f"of parameters; default: {MEGABYTES}")
    parser.add_argument("--soak", action="store_true", help="move random blocks instead, and compare the parameters")


if __name__ == "__main__":
    options = arguments(__doc__, extend)
    (run_soak if options.soak else run)(options).finish()
