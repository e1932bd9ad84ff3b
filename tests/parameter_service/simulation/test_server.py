"""Simulated aggregators, by hand where a hand can; then what the packers' formula predicts against them."""

from __future__ import annotations

import numpy as np
import pytest

from computron.parameter_service.packing.queueing import Burst, wait_of
from computron.parameter_service.simulation.server import SimulatedJob, simulate

CHUNK = 1e-3
LIMIT = 0.1


def waits(bursts, chunk, jitter):
    return [wait_of(place, bursts, chunk, jitter) for place in range(len(bursts))]


def run(*jobs, seconds=100.0, chunk=CHUNK, **others):
    return simulate([SimulatedJob(*job) for job in jobs], seconds=seconds, chunk=chunk, **others)


def test_a_job_alone_computes_then_aggregates():
    found = run(("a", 0.7, {"x": 0.3}, 0.1))["a"]
    assert (found.mean, found.longest) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.count == pytest.approx(75, abs=1)


def test_pieces_on_several_aggregators_are_worked_on_at_the_same_time():
    assert run(("a", 0.7, {"x": 0.3, "y": 0.1}, 0.1))["a"].mean == pytest.approx(1.0)


def test_equal_jobs_fall_into_step():
    found = run(*((f"job-{n}", 0.6, {"x": 0.2}, 0.1) for n in range(4)))
    assert all(job.mean == pytest.approx(0.8) for job in found.values())


def test_more_work_than_time_stretches_all():
    found = run(*((f"job-{n}", 0.1, {"x": 0.4}, 0.1) for n in range(3)))
    assert all(job.mean == pytest.approx(1.2) for job in found.values())


def test_an_urgent_job_waits_for_the_chunk_under_way_only():
    found = run(("long", 1.0, {"x": 5.0}, 1.0), ("short", 0.1, {"x": 0.01}, 0.01), chunk=0.02)
    assert 0.11 < found["short"].longest <= 0.13 + 1e-9


def test_work_that_is_late_goes_first():
    """Deadlines, not priorities: the long job's deadline comes nearer while short ones overtake it."""
    found = run(("long", 0.1, {"x": 0.5}, 0.2), ("short", 0.01, {"x": 0.09}, 0.05))
    assert found["long"].longest < 2.0


def test_the_seed_decides_everything():
    jobs = (("a", 0.71, {"x": 0.3}, 0.1), ("b", 0.23, {"x": 0.1}, 0.1))
    assert run(*jobs, jitter=0.05, seed=3) == run(*jobs, jitter=0.05, seed=3)
    assert run(*jobs, jitter=0.05, seed=3) != run(*jobs, jitter=0.05, seed=4)


def test_too_short_a_simulation_is_refused():
    with pytest.raises(ValueError, match=r"a ended 0 steps in 0.5 s"):
        run(("a", 0.7, {"x": 0.3}, 0.1), seconds=0.5)


def groups(seed, count):
    """Jobs on one aggregator: iterations of 20 ms to 1 s, 20 to 80 % of its time."""
    random = np.random.default_rng(seed)
    for number in range(count):
        size = int(random.integers(2, 7))
        periods = np.exp(random.uniform(np.log(0.02), np.log(1.0), size))
        works = periods * random.dirichlet(np.full(size, 2.0)) * random.uniform(0.2, 0.8)
        yield number, [(float(period), float(work)) for period, work in zip(periods, works, strict=True)]


def compare(number, group):
    """Predicted and simulated losses."""
    bursts = [Burst(period, work, LIMIT * period) for period, work in group]
    predicted = [
        1 - burst.period / (burst.period + wait.drifting + wait.in_step)
        for burst, wait in zip(bursts, waits(bursts, CHUNK, 0.01), strict=True)
    ]
    jobs = [(f"job-{place}", period - work, {"x": work}, LIMIT * period) for place, (period, work) in enumerate(group)]
    found = run(*jobs, seconds=40.0, jitter=0.02, seed=number)
    return predicted, [1 - burst.period / job.mean for burst, job in zip(bursts, found.values(), strict=True)]


def test_groups_predicted_within_the_limit_are_within_it():
    """The formula need not be exact, but what it lets in must hold, and it must not keep out most of what would."""
    groups_compared = [compare(number, group) for number, group in groups(5, 150)]
    accepted = [max(simulated) for predicted, simulated in groups_compared if max(predicted) <= 0.9 * LIMIT]
    good = sum(max(simulated) <= LIMIT for _, simulated in groups_compared)
    assert np.mean([worst <= LIMIT for worst in accepted]) >= 0.97
    assert max(accepted) <= 1.5 * LIMIT
    assert len(accepted) >= 0.6 * good


def test_predicted_and_simulated_losses_go_together():
    pairs = np.array([pair for number, group in groups(6, 150) for pair in zip(*compare(number, group), strict=True)])
    assert np.corrcoef(pairs.T)[0, 1] > 0.75
    assert abs(pairs[:, 0].mean() - pairs[:, 1].mean()) < 0.02
