"""The Parameter Service as it runs: a master, its aggregators and workers, each a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end import learner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS_BETWEEN = 3  # that are taken between two things that happen to a job


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def service() -> Callable[..., Any]:
    return importlib.import_module("_service").service


@pytest.fixture
def one_thread() -> Any:
    """As the workers: sums come in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Learning:
    """A job of `learner`. Every step's digest is checked in the end."""

    def __init__(self, running: Any, kind: str) -> None:
        self._running, self._kind = running, kind
        self._last = running.folder / f"{kind}.last"
        self._last.write_text("")
        command = [sys.executable, learner.__file__, running.url, str(running.folder), kind]
        self._workers = [subprocess.Popen([*command, str(rank)]) for rank in range(learner.WORKERS)]

    @property
    def job(self) -> Any:
        return self._running.get(f"/v1/jobs/{self._kind}")

    def lines(self, rank: int) -> list[str]:
        path = self._running.folder / f"{self._kind}.{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def go_on(self) -> None:
        """For some steps."""
        goal = len(self.lines(0)) + STEPS_BETWEEN
        self._running.until(lambda: self._alive() and min(len(self.lines(rank)) for rank in (0, 1)) >= goal)

    def move(self, to: str, blocks: Any) -> None:
        """Wait until it is done and seen in some steps."""
        before = self.job["migrations"]
        self._running.post(f"/v1/jobs/{self._kind}/move", {"to": to, "blocks": blocks})
        self._running.until(lambda: self.job["moving"] == 0 and self.job["migrations"] > before)
        self.go_on()

    def end(self) -> int:
        """Returns the number of steps."""
        last = len(self.lines(0)) + 2 * STEPS_BETWEEN
        self._last.write_text(str(last))
        assert [worker.wait(60) for worker in self._workers] == [0, 0]
        return last

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()

    def _alive(self) -> bool:
        assert [worker.poll() for worker in self._workers] == [None, None]
        return True


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_every_step_of_a_language_model_is_that_of_one_process_whatever_is_moved(
    service: Callable[..., Any], one_thread: None, kind: str
) -> None:
    with service(2, "--aggregators", "2:3", "--hysteresis", "1h", memory="128MiB") as running:
        learning = Learning(running, kind)
        try:
            learning.go_on()
            (owner,) = learning.job["aggregators"]
            (other,) = {one["id"] for one in running.aggregators()} - {owner}
            learning.move(other, "all")
            running.post("/v1/aggregators", {"count": 3})
            running.until(lambda: len(running.aggregators()) == 3)
            (new,) = {one["id"] for one in running.aggregators()} - {owner, other}
            learning.move(new, [block for block in range(learning.job["blocks"]) if block % 2])
            learning.move(owner, [0, 1, 4])
            assert set(learning.job["aggregators"]) == {owner, other, new}
            running.post("/v1/aggregators", {"count": 2})
            running.post(f"/v1/aggregators/{other}/drain", {})
            running.until(lambda: other not in {one["id"] for one in running.get("/v1/aggregators")["data"]})
            assert set(learning.job["aggregators"]) == {owner, new}
            learning.go_on()
            epoch = learning.job["epoch"]
            steps = learning.end()
            found = [learning.lines(rank) for rank in range(learner.WORKERS)]
        finally:
            learning.stop()
    assert epoch == 1  # nothing stopped the job
    expected = list(learner.reference(kind, steps))
    assert found == [expected, expected]
