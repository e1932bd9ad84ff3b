"""The Parameter Service as it runs: a master, its aggregators and workers, each a process of its own."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from computron.parameter_service import SGD, AdamW, ParameterService
from tests.end_to_end import learner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS_BETWEEN = 3  # that are taken between two things that happen to a job
PACE = 0.01  # seconds that a worker's compute takes


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


class Thread(threading.Thread):
    """A worker of its own thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        self.join(30)
        assert not self.is_alive()
        self.check()

    def check(self) -> bool:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error
        return True


def test_workers_come_and_go_and_gradients_are_averaged_over_those_that_are_there(
    service: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Rank r's gradient is 2^r, so that each step tells whose it was."""
    leave, seen = [threading.Event() for _ in range(3)], [0.0]

    def work(url: str, rank: int) -> None:
        parameter = nn.Parameter(torch.zeros(3))
        settings = ParameterService(url, "elastic", "secret", rank, workers=2, min_workers=1)
        with SGD([parameter], lr=1.0, service=settings) as optimizer:
            while not leave[rank].is_set():
                parameter.grad = torch.full((3,), 2.0**rank)
                time.sleep(PACE)
                optimizer.step()
                if rank == 1:
                    seen.append(-parameter[0].item())

    def changes() -> list[float]:
        return [round(after - before, 3) for before, after in itertools.pairwise(list(seen))]

    with service(2, memory="64MiB") as running:
        workers = [Thread(lambda rank=rank: work(running.url, rank)) for rank in (0, 1)]  # type: ignore[misc]

        def until_seen(change: float) -> None:
            running.until(lambda: all(worker.check() for worker in workers) and change in changes())

        until_seen(1.5)
        workers.append(Thread(lambda: work(running.url, 2)))
        until_seen(2.333)
        leave[0].set()
        until_seen(3.0)
        leave[2].set()
        until_seen(2.0)
        leave[1].set()
        for worker in workers:
            worker.finish()
    assert [change for change, _ in itertools.groupby(changes())] == [1.5, 2.333, 3.0, 2.0]
    assert caplog.text.count("already: this worker goes on from there") == 1, "only the one that came later says so"


class Published(nn.Module):
    """Trained and frozen parameters, and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(40, 60), nn.Linear(60, 8, bias=False)
        self.norm = nn.BatchNorm1d(60)
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.norm(self.first(x)))
        return scores


def test_versions_are_what_the_parameters_were_at_their_step(service: Callable[..., Any]) -> None:
    versions = {"v1": 3, "v2": 7, "last": 30}
    expected: dict[str, dict[str, Tensor]] = {}

    def work(url: str, rank: int) -> None:
        model = Published()
        settings = ParameterService(url, "published", "secret", rank, workers=2, extras=model, block_elements=1024)
        with AdamW((p for p in model.named_parameters() if p[1].requires_grad), lr=0.01, service=settings) as optimizer:
            for step in range(1, versions["last"] + 1):
                generator = torch.Generator().manual_seed(step * 2 + rank)
                model(torch.randn(16, 40, generator=generator)).square().mean().backward()
                name = next((name for name, at in versions.items() if at == step), None)
                if name is not None:
                    optimizer.publish(name)
                optimizer.step()
                if name is not None and rank == 0:
                    expected[name] = {key: value.clone() for key, value in model.state_dict().items()}
                optimizer.zero_grad()
                time.sleep(PACE)

    with service(2, memory="64MiB") as running:
        workers = [Thread(lambda rank=rank: work(running.url, rank)) for rank in (0, 1)]  # type: ignore[misc]
        running.until(lambda: all(worker.check() for worker in workers) and "v1" in expected)
        job = running.get("/v1/jobs/published")
        (elsewhere,) = {one["id"] for one in running.aggregators()} - set(job["aggregators"])
        running.post("/v1/jobs/published/move", {"to": elsewhere, "blocks": [0, 1]})
        for worker in workers:
            worker.finish()

        def listed() -> dict[str, Any]:
            return {version["id"]: version for version in running.get("/v1/jobs/published/versions")["data"]}

        running.until(lambda: len(listed()) == len(versions))
        assert {name: version["step"] for name, version in listed().items()} == versions
        for name, version in listed().items():
            found = load_file(version["path"])
            assert found.keys() == expected[name].keys()
            assert all(torch.equal(found[key], expected[name][key]) for key in found), name


@pytest.fixture
def faults() -> Any:
    return importlib.import_module("bench_faults")


def test_a_job_comes_through_deaths_of_each_kind(service: Callable[..., Any], faults: Any) -> None:
    every, chance = 10, random.Random(5)

    def owner() -> Any:
        job = running.get("/v1/jobs/faults")
        return next(one for one in running.aggregators() if one["id"] in job["aggregators"])

    def kill_one(dying: Any) -> Callable[[], bool]:
        os.kill(dying["pid"], signal.SIGKILL)
        return lambda: dying["pid"] not in {one["pid"] for one in running.aggregators()} and faults.is_whole(running)

    def kill_aggregator() -> Callable[[], bool]:
        return kill_one(owner())

    def kill_aggregator_that_moves_all() -> Callable[[], bool]:
        dying = owner()
        to = next(one["id"] for one in running.aggregators() if one["id"] != dying["id"])
        running.post("/v1/jobs/faults/move", {"blocks": "all", "to": to})
        return kill_one(dying)

    def kill_master() -> Callable[[], bool]:
        running.master.kill()
        running.master.wait()
        running.start()
        return lambda: bool(faults.is_whole(running))

    def kill_worker() -> Callable[[], bool]:
        epoch = running.get("/v1/jobs/faults")["epoch"]
        training.replace(1)
        return lambda: running.get("/v1/jobs/faults")["epoch"] > epoch and faults.is_whole(running)

    kills = (kill_aggregator, kill_master, kill_worker, kill_aggregator_that_moves_all)
    with service(2, "--hysteresis", "1h", memory="64MiB") as running:
        training = faults.Training(running, every, faults.WORKERS)
        try:
            faults.recovered(training, running, time.monotonic(), lambda: True)
            lost = [0] * faults.WORKERS
            for kill in kills:
                time.sleep(chance.uniform(0.1, 0.3))
                running.until(lambda: len(running.aggregators()) == 2 and training.spare_is_ready())
                dealt_with = kill()
                faults.recovered(training, running, time.monotonic(), dealt_with)
                before, lost = lost, [lost for _, lost, _ in training.progress()]
                assert all(now - then <= every for now, then in zip(lost, before, strict=True))
            last = training.end()
        finally:
            training.stop()
        expected = faults.reference(last)[0].state_dict()
        for rank in range(faults.WORKERS):
            found = torch.load(running.folder / f"parameters-{rank}.pt")
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_random_moves_of_two_jobs_leave_their_parameters_right(service: Callable[..., Any], one_thread: None) -> None:
    migration = importlib.import_module("bench_migration")
    with service(3, "--hysteresis", "1h", memory="64MiB") as running:
        assert migration.soak(running, 40, random.Random(11)) == 0
