"""What any policy must do: the first requests, swap-ins, evictions, steps, and their bookkeeping."""

from __future__ import annotations

import pytest
from driver import Driver
from virtual_device import spec

from computron.scheduling.actions import Evict, Preempt, Reject, Run, SetCache, SwapIn
from computron.scheduling.policies import POLICIES


@pytest.fixture(params=sorted(POLICIES))
def policy(request):
    return request.param


def test_first_request_brings_its_model_and_runs(policy):
    driver = Driver(4, [spec("a", 2)], policy=policy)
    driver.arrive(1, "a")
    driver.drain()
    assert driver.outcomes == {1: "finished"}
    assert driver.of(SwapIn) == [SwapIn("a", (0, 1), 0)]
    assert driver.of(Run) == [Run("a", (1,))]


def test_resident_model_is_not_brought_again(policy):
    driver = Driver(4, [spec("a", 2)], policy=policy)
    driver.arrive(1, "a")
    driver.arrive(2, "a", 1.0)
    driver.drain()
    assert len(driver.of(SwapIn)) == 1
    assert driver.waits[2] == 0.0


def test_model_leaves_for_another_that_does_not_fit_beside_it(policy):
    driver = Driver(4, [spec("a", 3), spec("b", 3)], policy=policy)
    driver.arrive(1, "a")
    driver.arrive(2, "b", 1.0)
    driver.arrive(3, "a", 2.0)
    driver.drain()
    assert set(driver.outcomes.values()) == {"finished"}
    assert driver.runs() == ["a", "b", "a"]
    assert driver.of(Evict)


def test_requests_of_one_model_share_a_step_up_to_its_batch_size(policy):
    driver = Driver(4, [spec("a", 2, batch=3)], policy=policy)
    for request in range(5):
        driver.arrive(request, "a")
    driver.arrive(5, "a", 0.1)
    driver.drain()
    assert [len(run.requests) for run in driver.of(Run)] == [1, 3, 2]


def test_sequence_runs_for_many_steps_and_grows_its_cache(policy):
    model = spec("a", 2, continuous=True, blocks_per_frame=2.0)
    driver = Driver(6, [model], policy=policy)
    driver.arrive(1, "a", steps=5, growth=1, blocks=1)
    driver.drain()
    assert [action.frames for action in driver.of(SetCache)] == [1, 2, 3, 0]
    assert len(driver.of(Run)) == 5


def test_new_requests_join_a_generation_under_way(policy):
    model = spec("a", 2, continuous=True, blocks_per_frame=4.0)
    driver = Driver(6, [model], policy=policy)
    driver.arrive(1, "a", steps=10, blocks=1)
    driver.arrive(2, "a", 0.3, steps=2, blocks=1)
    driver.drain()
    assert any(run.requests == (1, 2) for run in driver.of(Run))


def test_youngest_sequence_gives_way_when_the_cache_is_full(policy):
    model = spec("a", 2, continuous=True, blocks_per_frame=1.0)
    driver = Driver(8, [model], policy=policy)
    driver.arrive(1, "a", 0.0, steps=4, growth=1, blocks=1)
    driver.arrive(2, "a", 0.0, steps=4, growth=1, blocks=1)
    driver.drain()
    assert driver.outcomes == {1: "finished", 2: "finished"}
    assert driver.of(Preempt) == [Preempt("a", 2)]


def test_shared_pages_are_mapped_and_not_moved_again(policy):
    driver = Driver(4, [spec("a", (1, 2, 3)), spec("b", (1, 2, 4))], policy=policy)
    driver.arrive(1, "a")
    driver.arrive(2, "b", 1.0)
    driver.drain()
    assert not driver.of(Evict)
    assert driver.device.mapped == {"a": {0, 1, 2}, "b": {0, 1, 2}}
    assert driver.device.free == 0


def test_content_in_flight_for_another_model_is_waited_for(policy):
    driver = Driver(5, [spec("a", (1, 2, 3)), spec("b", (3, 4))], policy=policy)
    driver.arrive(1, "a")
    driver.arrive(2, "b", 0.05)
    driver.drain()
    assert [swap.model for swap in driver.of(SwapIn)] == ["a", "b"]
    assert set(driver.outcomes.values()) == {"finished"}


def test_too_large_model_is_rejected_at_arrival(policy):
    driver = Driver(2, [spec("a", 3)], policy=policy)
    driver.arrive(1, "a")
    driver.drain()
    assert driver.outcomes == {1: "too_large"}
    assert driver.of(Reject)[0].reason == "too_large"
