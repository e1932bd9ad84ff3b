"""Jobs that come and go through a packer, where the sums can be done by hand."""

from __future__ import annotations

import pytest

from computron.parameter_service.packing import PACKERS, BlockLoad, Fleet, JobLoad, Limits
from computron.parameter_service.simulation.experiment import ServerPerJob, replay, simulated_losses
from computron.parameter_service.simulation.trace import TracedJob


def traced(name, arrival, steps, period=1.0, cpu=0.1):
    load = JobLoad(name, period, (BlockLoad(0, cpu / 2), BlockLoad(1, cpu / 2)))
    return TracedJob(load, "kind", 1, arrival, steps)


THREE = [traced("a", 0.0, 100), traced("b", 50.0, 100), traced("c", 100.0, 100, cpu=0.2)]


def test_an_aggregator_each_is_reserved_for_as_long_as_each_lives():
    found = replay(THREE, ServerPerJob())
    assert found.reserved == pytest.approx(300.0)
    assert found.cpu == pytest.approx(40.0)
    assert found.used == pytest.approx(40.0)
    assert found.rounded == pytest.approx(200.0)
    assert found.losses == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert found.timeline[-1] == (200.0, 0, 0)


@pytest.mark.parametrize("name", sorted(PACKERS))
def test_packed_jobs_give_the_same_work_with_fewer_aggregators(name):
    found = replay(THREE, PACKERS[name](Limits(jitter=0.0)))
    assert found.reserved == pytest.approx(200.0)
    assert found.cpu == pytest.approx(40.0)
    assert max(found.losses.values()) == pytest.approx(0.0, abs=1e-9)


def test_a_job_that_loses_goes_on_for_longer():
    jobs = [traced("slow", 0.0, 100, period=1.0, cpu=0.01), traced("quick", 0.0, 100, period=0.92, cpu=0.01)]
    found = replay(jobs, PACKERS["cyclic"]())
    assert found.worst == pytest.approx(0.08)
    assert found.reserved == pytest.approx(100.0)
    assert found.losses == {"slow": 0.0, "quick": pytest.approx(0.08)}


def test_what_is_left_is_drained_when_others_have_gone():
    jobs = [
        *(traced(f"long-{n}", 0.0, 1000, cpu=0.3) for n in range(2)),
        *(traced(f"short-{n}", 0.0, 10, cpu=0.3) for n in range(6)),
    ]
    found = replay(jobs, PACKERS["utilisation"]())
    assert max(count for _, count, _ in found.timeline) > 1
    assert [count for time, count, active in found.timeline if active == 2 and time > 10.0][-1] == 1


def test_moments_are_kept_as_asked():
    assert [moment.time for moment in replay(THREE, ServerPerJob(), keep_every=2).moments] == [50.0, 100.0]
    assert replay(THREE, ServerPerJob()).moments == []


def test_losses_are_simulated_where_blocks_are():
    one, two = traced("one", 0.0, 1, cpu=0.5).load, traced("two", 0.0, 1, cpu=0.5).load
    fleet = Fleet().opened("ab")
    fleet = fleet.placing(one, {0: "a", 1: "b"}).placing(two, {0: "a", 1: "b"})
    found = simulated_losses(fleet, Limits())
    assert found == {name: pytest.approx(1 - 1.0 / 0.75) for name in ("one", "two")}  # in step, each half as long
