"""Orders to the workers that train for bench_aggregation, and what they measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _service import Service

WORKER = Path(__file__).parent / "_training_worker.py"
WORKERS = 2


@dataclass(frozen=True)
class Measured:
    """p50, p99: seconds of a step. cpu: seconds of all processes of the job for a step."""

    p50: float
    p99: float
    cpu: float


def measured(answers: Sequence[dict[str, Any]]) -> Measured:
    seconds = [one for answer in answers for one in answer["seconds"]]
    p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
    return Measured(
        statistics.median(seconds), p99, sum(answer["cpu"] for answer in answers) / len(answers[0]["seconds"])
    )


def servers(service: Service) -> tuple[int, ...]:
    """The processes that a job's steps take besides its workers."""
    return (service.master.pid, *(one["pid"] for one in service.aggregators()))


class Workers:
    """They run all trainings one after the other: what is measured begins in warm processes."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def do(self, what: str, *, count: int = WORKERS, pids: Sequence[int] = (), **order: Any) -> list[dict[str, Any]]:
        """Ask the first `count` of them, and wait for their answers. The first one counts the CPU time of `pids`."""
        for rank, process in enumerate(self._processes[:count]):
            assert process.stdin is not None
            given = dict(order)
            if isinstance(given.get("steps"), dict):
                given["steps"] = {**given["steps"], "servers": tuple(pids) if rank == 0 else ()}
            process.stdin.write(json.dumps({"what": what, **given}) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._processes[:count]]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def workers() -> Iterator[Workers]:
    with TemporaryDirectory(prefix="computron-") as folder:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        arguments = [(str(rank), str(WORKERS), f"{folder}/meeting") for rank in range(WORKERS)]
        processes = [subprocess.Popen([sys.executable, str(WORKER), *given], **pipes) for given in arguments]
        try:
            found = Workers(processes)
            for process in processes:
                found._answer(process)
            yield found
            for process in processes:
                process.communicate()
        finally:
            for process in processes:
                process.kill()
                process.wait()
