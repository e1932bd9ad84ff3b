"""The promise: nobody waits past `max_wait` because of other models, but for one swap, one step, and older promises."""

from __future__ import annotations

import pytest
from driver import PAGE_SECONDS, Driver
from virtual_device import spec

from computron.scheduling.actions import CancelSwap, Run, SwapIn, Urgency
from computron.scheduling.events import UnloadAsked
from computron.scheduling.policies import POLICIES
from computron.scheduling.tuning import Tuning


@pytest.fixture(params=sorted(POLICIES))
def policy(request):
    return request.param


def test_busy_model_gives_way_to_one_that_waited_long_enough(policy):
    driver = Driver(4, [spec("busy", 4, batch=1), spec("rare", 3)], step_seconds=0.2, max_wait=3.0, policy=policy)
    for number in range(100):
        driver.arrive(number, "busy", 0.01 * number)
    driver.arrive(100, "rare", 0.02)
    driver.drain()
    assert driver.waits[100] <= 3.0 + 3 * PAGE_SECONDS + 0.2


def test_long_generation_is_paused_for_another_model(policy):
    models = [spec("long", 3, continuous=True, blocks_per_frame=1.0), spec("short", 3)]
    driver = Driver(5, models, step_seconds=0.05, max_wait=4.0, policy=policy)
    driver.arrive(1, "long", steps=1000, blocks=2)
    driver.arrive(2, "short", 1.0)
    driver.drain()
    assert driver.outcomes == {1: "finished", 2: "finished"}
    assert driver.waits[2] <= 4.0 + 3 * PAGE_SECONDS + 0.05
    assert driver.runs() == ["long", "short", "long"]


def test_generations_of_many_models_take_turns(policy):
    models = [spec(name, 3, continuous=True, blocks_per_frame=4.0) for name in "abcd"]
    driver = Driver(8, models, step_seconds=0.05, max_wait=5.0, policy=policy)
    last: dict[str, float] = {}
    gaps: list[float] = []

    def on_run(model, requests):
        gaps.append(driver.now - last.get(model, driver.now))
        last[model] = driver.now

    driver.on_run = on_run
    for number, name in enumerate("abcd"):
        driver.arrive(number, name, steps=300, blocks=1)
    driver.drain()
    turn = 2 * 3 * PAGE_SECONDS  # a swap-in, and the turn that pays for it
    assert max(gaps) <= 5.0 + 4 * (turn + 0.05)
    moved = sum(len(swap.pages) for swap in driver.of(SwapIn))
    assert moved * PAGE_SECONDS <= driver.now / 2, "more swapping than work"


def test_what_is_due_is_served_in_the_order_in_which_it_became_due(policy):
    models = [spec(name, 3, batch=4) for name in "abcde"]
    driver = Driver(4, models, step_seconds=0.1, max_wait=0.5, policy=policy)
    for number, name in enumerate("abcde"):
        driver.arrive(number, name, 0.01 * number)
    driver.drain()
    assert [run.model for run in driver.of(Run)] == list("abcde")


def test_swap_in_that_can_wait_is_cancelled_for_what_is_due(policy):
    models = [spec("hot", 1), spec("big", 30), spec("soon", 4)]
    steps = {"hot": 0.5, "big": 0.1, "soon": 0.1}
    driver = Driver(32, models, step_seconds=steps, max_wait=10.0, policy=policy)
    driver.arrive(0, "hot")  # keeps the node busy, so that nothing starts early
    driver.arrive(1, "big", 0.3)
    driver.arrive(2, "soon", 0.4, deadline=1.5)
    driver.drain()
    assert driver.of(CancelSwap) == [CancelSwap("big")]
    assert set(driver.outcomes.values()) == {"finished"}
    assert driver.waits[2] <= 0.5


def test_what_came_in_because_it_was_due_is_not_evicted_before_it_ran(policy):
    models = [spec("long", 1, batch=1), spec("first", 3), spec("second", 3)]
    steps = {"long": 3.0, "first": 0.1, "second": 0.1}
    driver = Driver(4, models, step_seconds=steps, max_wait=0.5, policy=policy, tuning=Tuning(keep=0.0))
    driver.arrive(0, "long")
    driver.arrive(1, "first", 0.2)
    driver.arrive(2, "second", 0.3)
    driver.drain()
    wanted = [swap.model for swap in driver.of(SwapIn) if swap.urgency == Urgency.DEMAND]
    assert wanted == ["long", "first", "second"]


def test_no_step_starts_while_frames_come_free_for_what_is_due_earlier(policy):
    models = [spec("near", 1, batch=1), spec("gone", 10), spec("due", 4)]
    steps = {"near": 0.605, "gone": 0.1, "due": 0.1}
    driver = Driver(12, models, step_seconds=steps, max_wait=0.5, policy=policy, prefetch=False)
    driver.arrive(0, "near", 4.8)  # in a step from 4.9 to 5.505
    driver.arrive(1, "gone", 5.0, deadline=5.5)
    driver.arrive(2, "due", 5.01)
    driver.arrive(3, "near", 5.02)
    driver.run_until(4.85)
    driver.drain()
    assert driver.outcomes[1] == "deadline"
    assert driver.runs() == ["near", "due", "near"]


def test_resident_models_run_beside_the_swap_in_of_what_is_due_only_if_they_end_in_time(policy):
    models = [spec("quick", 1, batch=1), spec("slow", 1, batch=1), spec("due", 10)]
    driver = Driver(12, models, step_seconds={"quick": 0.1, "slow": 0.9, "due": 0.1}, max_wait=0.1, policy=policy)
    driver.arrive(0, "quick")
    driver.arrive(1, "slow", 1.0)
    driver.arrive(2, "due", 3.0)  # now the steps of all are known
    driver.at(5.0, UnloadAsked("due"))
    driver.arrive(20, "due", 6.0)
    driver.arrive(21, "slow", 6.3)
    driver.arrive(22, "quick", 6.4)
    driver.drain()
    assert driver.waits[20] <= 10 * PAGE_SECONDS
    assert driver.waits[21] > 0.6
    assert driver.waits[22] == 0.0
