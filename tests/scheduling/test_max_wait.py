"""The promise: nobody waits past `max_wait` because of other models, but for one swap, one step, and older promises."""

from __future__ import annotations

import pytest
from driver import PAGE_SECONDS, Driver, spec

from computron.scheduling.actions import CancelSwap, Run, SwapIn
from computron.scheduling.events import UnloadAsked
from computron.scheduling.scheduler import POLICIES


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


def test_swap_in_for_something_younger_is_cancelled_for_what_is_due(policy):
    models = [spec("hot", 1, batch=1), spec("big", 30), spec("old", 4)]
    driver = Driver(32, models, step_seconds=0.1, max_wait=2.0, policy=policy)
    for number in range(60):
        driver.arrive(number, "hot", 0.1 * number)
    driver.arrive(100, "big", 0.5, priority=1)
    driver.arrive(101, "old", 0.4)
    driver.drain()
    assert driver.waits[101] <= 2.0 + 4 * PAGE_SECONDS + 0.1
    assert driver.of(CancelSwap) or driver.waits[101] < 2.0
    assert set(driver.outcomes.values()) == {"finished"}


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
