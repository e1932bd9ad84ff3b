"""What is turned away, what is promised: queues, sizes, deadlines, priorities, pinned models, operators' wishes."""

from __future__ import annotations

import pytest
from driver import Driver
from virtual_device import spec

from computron.scheduling.actions import Evict, EvictionReason, Preempt, Run, SwapIn, Urgency
from computron.scheduling.events import LoadAsked, ModelAdded, ModelRemoved, Request, RequestArrived, UnloadAsked
from computron.scheduling.policies import POLICIES
from computron.scheduling.tuning import Tuning


@pytest.fixture(params=sorted(POLICIES))
def policy(request):
    return request.param


def order_of_starts(driver):
    seen = []
    for run in driver.of(Run):
        seen += [request for request in run.requests if request not in seen]
    return seen


def test_full_queue_rejects_and_unknown_model_rejects(policy):
    driver = Driver(4, [spec("a", 2, batch=1, max_queue=2)], policy=policy)
    for number in range(4):
        driver.arrive(number, "a", number / 100)
    driver.arrive(4, "nobody", 0.05)
    driver.drain()
    assert driver.outcomes[3] == "queue_full"
    assert driver.outcomes[4] == "unknown_model"


def test_request_whose_cache_can_never_fit_is_rejected_at_arrival(policy):
    driver = Driver(6, [spec("a", 4, continuous=True, blocks_per_frame=2.0)], policy=policy)
    driver.arrive(1, "a", blocks=4)
    driver.arrive(2, "a", blocks=5)
    driver.drain()
    assert driver.outcomes == {1: "finished", 2: "too_large"}


def test_sequence_that_outgrows_the_device_is_rejected(policy):
    driver = Driver(6, [spec("a", 4, continuous=True, blocks_per_frame=1.0)], policy=policy)
    driver.arrive(1, "a", steps=10, growth=1, blocks=1)
    driver.arrive(2, "a", 3.0)
    driver.drain()
    assert driver.outcomes == {1: "too_large", 2: "finished"}


def test_single_sequence_that_fits_takes_the_device_from_everybody(policy):
    models = [spec("a", 4, continuous=True, blocks_per_frame=1.0), spec("b", 4, continuous=True, blocks_per_frame=1.0)]
    driver = Driver(10, models, policy=policy, max_wait=1.0)
    driver.arrive(1, "a", steps=6, growth=1, blocks=1)
    driver.arrive(2, "b", steps=6, growth=1, blocks=1)
    driver.arrive(3, "b", steps=6, growth=1, blocks=1)
    driver.drain()
    assert set(driver.outcomes.values()) == {"finished"}


def test_request_that_has_not_started_by_its_deadline_is_rejected(policy):
    driver = Driver(2, [spec("a", 2), spec("b", 2)], step_seconds=2.0, policy=policy)
    driver.arrive(1, "a")
    driver.arrive(2, "b", 0.1, deadline=1.0)
    driver.drain()
    assert driver.outcomes == {1: "finished", 2: "deadline"}
    assert driver.now < 3.0


def test_deadline_brings_a_model_before_older_requests(policy):
    driver = Driver(2, [spec("a", 2, batch=1), spec("b", 2)], step_seconds=0.5, policy=policy)
    for number in range(6):
        driver.arrive(number, "a")
    driver.arrive(6, "b", 0.1, deadline=2.0)
    driver.drain()
    assert driver.outcomes[6] == "finished"


def test_higher_priority_is_served_first(policy):
    driver = Driver(6, [spec("a", 2, batch=1)], policy=policy)
    driver.arrive(0, "a")
    for number, priority in [(1, 0), (2, 1), (3, 0), (4, 2)]:
        driver.arrive(number, "a", 0.01, priority=priority)
    driver.drain()
    assert order_of_starts(driver) == [0, 4, 2, 1, 3]


def test_low_priority_is_served_once_it_is_due(policy):
    driver = Driver(3, [spec("a", 2, batch=1)], step_seconds=0.1, max_wait=2.0, policy=policy)
    driver.arrive(0, "a", 0.01, priority=0)
    for number in range(1, 100):
        driver.arrive(number, "a", 0.05 * (number - 1), priority=1)
    driver.drain()
    assert driver.waits[0] <= 2.0 + 0.1


def test_pinned_model_comes_in_when_added_and_never_leaves(policy):
    driver = Driver(5, [spec("p", 2, pinned=True), spec("a", 3), spec("b", 3)], policy=policy)
    driver.run_until(1.0)
    assert driver.scheduler.state("p") == "resident"
    for number in range(10):
        driver.arrive(number, "ab"[number % 2], 1.0 + number)
    driver.drain()
    assert driver.scheduler.resident_fraction("p") == 1.0
    assert {evict.model for evict in driver.of(Evict)} == {"a", "b"}


def test_too_many_pinned_models_are_refused_with_numbers(policy):
    driver = Driver(5, [spec("p", 4, pinned=True)], policy=policy)
    with pytest.raises(
        ValueError, match="'q' cannot be pinned: with it, pinned models take 6 frames, the device has 5"
    ):
        driver.scheduler.handle(ModelAdded(spec("q", 2, pinned=True)), driver.now)
    driver.drain()


def test_model_that_does_not_fit_beside_the_pinned_ones_is_too_large(policy):
    driver = Driver(5, [spec("p", 3, pinned=True), spec("a", 3)], policy=policy)
    driver.arrive(1, "a", 1.0)
    driver.drain()
    assert driver.outcomes == {1: "too_large"}


def test_asked_model_is_loaded_into_what_nobody_needs(policy):
    driver = Driver(5, [spec("a", 3), spec("b", 3)], policy=policy)
    driver.at(0.0, LoadAsked("a"))
    driver.drain()
    assert driver.of(SwapIn) == [SwapIn("a", (0, 1, 2), Urgency.BACKGROUND)]
    driver.arrive(1, "b", 1.0)
    driver.drain()
    assert driver.outcomes == {1: "finished"}


def test_asked_model_leaves_when_it_is_idle(policy):
    driver = Driver(5, [spec("a", 3)], step_seconds=1.0, policy=policy)
    driver.arrive(1, "a")
    driver.at(0.5, UnloadAsked("a"))
    driver.drain()
    assert driver.outcomes == {1: "finished"}
    assert driver.of(Evict) == [Evict("a", (2, 1, 0), EvictionReason.UNLOAD)]
    assert driver.scheduler.state("a") == "absent"


def test_removed_model_is_forgotten_and_its_frames_are_free(policy):
    driver = Driver(5, [spec("a", (1, 2, 3)), spec("b", (3, 4, 5))], policy=policy)
    driver.arrive(1, "a")
    driver.arrive(2, "b", 1.0)
    driver.drain()
    scheduler = driver.scheduler
    scheduler.handle(ModelRemoved("a"), driver.now)
    scheduler.check()
    assert scheduler.free_frames == 2
    assert scheduler.models == ("b",)
    [reject] = scheduler.handle(RequestArrived(Request(3, "a", driver.now)), driver.now)
    assert reject.reason == "unknown_model"


def test_model_that_lost_a_page_while_its_sequences_grew_lets_one_of_them_go():
    models = [spec("other", 1, batch=1), spec("long", 4, batch=2, continuous=True, blocks_per_frame=1.0)]
    driver = Driver(9, models, step_seconds=0.5, max_wait=0.2, prefetch=False, tuning=Tuning(keep=0.0))
    driver.arrive(1, "other", 1.0)
    driver.arrive(2, "long", steps=3, growth=1, blocks=3)
    driver.arrive(3, "long", steps=2, blocks=1)
    driver.drain()
    assert driver.of(Preempt) == [Preempt("long", 3)]
    assert set(driver.outcomes.values()) == {"finished"}
