"""What the master makes of jobs that are slower than they should be; without a clock or a network."""

from __future__ import annotations

import math

import pytest

from computron.parameter_service.master.events import CountAsked
from computron.parameter_service.master.loads import load_of, observed_loss
from computron.parameter_service.wire.messages import Progress, Stop
from tests.parameter_service.master.test_scaling import Bench

COMPUTE, CPU, HANDLING = 0.1, 0.01, 0.005  # seconds of an iteration


def owners(bench: Bench, job: str) -> set[str]:
    return set(bench.master.state.jobs[job].book.owners)


def together(behind: float = 10.0) -> Bench:
    """Two jobs on one aggregator, measured there; "a" was measured alone before."""
    bench = Bench(minimum=1, maximum=4)
    bench.begin(*bench.wait())
    bench.train("a")
    train(bench, {"a": HANDLING}, 8, behind)
    bench.train("b")
    train(bench, {"a": HANDLING, "b": HANDLING}, 8, behind)
    assert owners(bench, "a") == owners(bench, "b")
    return bench


def train(bench: Bench, extra: dict[str, float], seconds: int, behind: float = 10.0) -> list[str]:
    """extra: seconds that each job waits beyond its work; behind: so many of them others' work explains.

    Returns the names of aggregators that were to be started meanwhile.
    """
    started = []
    for _ in range(seconds):
        for job, more in extra.items():
            step = bench.master.state.jobs[job].step + 1
            bench.report(job, compute=COMPUTE, wait=2 * CPU + more, cpu=CPU, step=step, behind=behind)
        started += bench.wait(1.0)
        bench.carry_out_moves()
    return started


def test_what_a_job_waits_on_an_aggregator_of_its_own_is_not_lost_by_sharing() -> None:
    bench = Bench(minimum=1, maximum=2)
    bench.begin(*bench.wait())
    bench.train("a")
    train(bench, {"a": 0.05}, 8)
    job = bench.master.state.jobs["a"]
    assert observed_loss(bench.master.state, job) == 0.0
    bench.train("b")
    train(bench, {"a": 0.05, "b": 0.0}, 8)
    assert observed_loss(bench.master.state, job) == 0.0
    train(bench, {"a": 0.15, "b": 0.0}, 10)
    loss = observed_loss(bench.master.state, job)
    assert loss is not None
    assert 0.3 < loss < 0.4  # 0.1 of 0.27 s


def test_one_slow_report_moves_nothing() -> None:
    bench = together()
    assert train(bench, {"a": 1.0, "b": HANDLING}, 1) == []
    assert train(bench, {"a": HANDLING, "b": HANDLING}, 1) == []
    assert owners(bench, "a") == owners(bench, "b")


def test_while_an_aggregator_is_on_its_way_no_further_one_is_started() -> None:
    bench = together()
    assert train(bench, {"a": 0.2, "b": HANDLING}, 9) == ["aggregator-2"]
    assert bench.master.scaling.wanted == 2


def test_a_job_slower_than_predicted_is_alone_for_a_while() -> None:
    bench = together()
    for name in train(bench, {"a": 0.2, "b": HANDLING}, 9):
        bench.begin(name, 2)
    train(bench, {"a": 0.2, "b": HANDLING}, 2)
    assert owners(bench, "a").isdisjoint(owners(bench, "b"))
    train(bench, {"a": HANDLING, "b": HANDLING}, 22)
    assert owners(bench, "a").isdisjoint(owners(bench, "b"))
    train(bench, {"a": HANDLING, "b": HANDLING}, 20)  # ten times the hysteresis have passed
    assert owners(bench, "a") == owners(bench, "b")
    assert bench.heard("aggregator-1", Stop) or bench.heard("aggregator-2", Stop)


def test_asking_for_a_number_does_not_add_to_those_that_are_needed() -> None:
    bench = together()
    train(bench, {"a": 0.2, "b": HANDLING}, 9)
    assert bench.master.scaling.wanted == 2
    bench.tell(CountAsked(2))
    assert bench.master.scaling.wanted == 2
    bench.tell(CountAsked(3))
    assert bench.master.scaling.wanted == 3


def test_what_others_work_does_not_explain_is_not_lost_by_sharing() -> None:
    bench = together(behind=0.001)
    assert train(bench, {"a": 1.0, "b": HANDLING}, 10, behind=0.001) == []
    loss = observed_loss(bench.master.state, bench.master.state.jobs["a"])
    assert loss is not None
    assert 0.0 < loss < 0.1


@pytest.mark.parametrize(
    ("compute", "wait"), [(-1.0, 0.5), (0.1, -0.5), (math.nan, 0.5), (0.1, math.inf), (1e308, 0.5)]
)
def test_times_that_cannot_be_do_not_count(compute: float, wait: float) -> None:
    """Whoever knows a job's token can report them."""
    bench = together()
    job = bench.master.state.jobs["a"]
    before = load_of(bench.master.state, job)
    for step in range(100, 110):
        bench.say("a", Progress("a", 0, job.book.epoch, step, compute, wait))
        bench.wait(1.0)
    assert job.step == 109
    assert load_of(bench.master.state, job) == before
