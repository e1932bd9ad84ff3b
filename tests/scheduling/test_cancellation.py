"""Clients that leave: while they wait, in a step, during a swap-in; and events that cross on their way."""

from __future__ import annotations

from driver import Driver
from virtual_device import spec

from computron.scheduling.actions import CancelSwap, Run, SetCache, SwapIn
from computron.scheduling.events import Request, RequestArrived, RequestCancelled


def test_waiting_request_frees_its_place_at_once():
    driver = Driver(4, [spec("a", 2, max_queue=1)])
    driver.arrive(0, "a")  # starts early, and leaves the queue empty
    driver.arrive(1, "a", 0.01)
    driver.cancel(1, 0.02)
    driver.arrive(2, "a", 0.03)
    driver.drain()
    assert driver.outcomes == {0: "finished", 1: "cancelled", 2: "finished"}


def test_request_in_a_step_leaves_when_the_step_ends():
    driver = Driver(6, [spec("a", 2, continuous=True, blocks_per_frame=1.0)])
    driver.arrive(1, "a", steps=50, blocks=2)
    driver.cancel(1, 0.3)
    driver.drain()
    assert driver.outcomes == {1: "cancelled"}
    assert driver.of(SetCache)[-1] == SetCache("a", 0)
    assert driver.now < 0.5


def test_paused_sequence_gives_its_cache_back_at_once():
    models = [spec("a", 2, continuous=True, blocks_per_frame=1.0), spec("b", 3)]
    driver = Driver(4, models)
    driver.arrive(1, "a", steps=1000, blocks=1)
    driver.arrive(2, "b", 1.0)
    driver.run_until(1.0)
    while driver.scheduler.state("a") == "running" and driver.now < 40.0:
        driver.run_until(driver.now + 0.01)
    driver.cancel(1, driver.now)
    driver.run_until(driver.now + 0.001)
    assert driver.scheduler.cache_frames("a") == 0
    driver.drain()


def test_cancellation_that_crosses_the_answer_is_ignored():
    driver = Driver(4, [spec("a", 2)])
    driver.arrive(1, "a")
    driver.at(5.0, RequestCancelled(1))
    driver.drain()
    assert driver.scheduler.queue_depth("a") == driver.scheduler.running_count("a") == 0


def test_swap_in_for_nobody_gives_way_to_one_that_is_wanted():
    driver = Driver(8, [spec("a", 4), spec("b", 4), spec("c", 1)], step_seconds={"a": 0.05, "b": 0.05, "c": 3.0})
    driver.arrive(0, "c")  # keeps the node busy, so that nothing starts early
    driver.arrive(1, "a", 0.2)
    driver.arrive(2, "b", 0.3)
    driver.cancel(1, 0.4)
    driver.drain()
    assert driver.of(CancelSwap) == [CancelSwap("a")]
    assert driver.outcomes == {0: "finished", 1: "cancelled", 2: "finished"}


def test_pages_that_came_before_a_cancellation_stay():
    driver = Driver(9, [spec("a", 4), spec("b", 4), spec("c", 1)], step_seconds={"a": 0.05, "b": 0.05, "c": 3.0})
    driver.arrive(0, "c")
    driver.arrive(1, "a", 0.2)
    driver.arrive(2, "b", 0.25)
    driver.cancel(1, 0.4)
    driver.arrive(3, "a", 2.0)
    driver.drain()
    swaps = [swap.pages for swap in driver.of(SwapIn) if swap.model == "a"]
    assert swaps == [(0, 1, 2, 3), (2, 3)]


def test_everybody_leaving_leaves_nothing_behind():
    driver = Driver(6, [spec("a", 2, continuous=True, blocks_per_frame=1.0), spec("b", 3)])
    for number in range(20):
        driver.arrive(number, "ab"[number % 2], number / 100, steps=5, blocks=1 - number % 2)
        driver.cancel(number, number / 100 + 0.05)
    driver.drain()
    assert driver.scheduler.waiting == driver.scheduler.running == 0


def test_id_of_an_ended_request_may_be_used_again():
    driver = Driver(4, [spec("a", 2)])
    driver.arrive(1, "a")
    driver.drain()
    actions = driver.scheduler.handle(RequestArrived(Request(1, "a", driver.now)), driver.now)
    assert actions == [Run("a", (1,))]
