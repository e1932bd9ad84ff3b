"""What the default policy weighs: who comes, who leaves, what is fetched ahead, when a run starts."""

from __future__ import annotations

import itertools
import random

import pytest
from driver import PAGE_SECONDS, Driver
from virtual_device import spec

from computron.scheduling.actions import CancelSwap, Evict, Preempt, Run, SwapIn, Urgency
from computron.scheduling.events import UnloadAsked
from computron.scheduling.policies.default import Default
from computron.scheduling.tuning import Tuning


def times(driver, kind, model):
    return [time for time, action in driver.actions if isinstance(action, kind) and action.model == model]


def test_only_as_many_pages_leave_as_are_needed_and_the_last_ones_first():
    driver = Driver(8, [spec("a", 6), spec("b", 4)])
    driver.arrive(1, "a")
    driver.arrive(2, "b", 2.0)
    driver.drain()
    assert driver.of(Evict)[0].pages == (5, 4)


def test_returning_model_brings_only_what_is_missing():
    driver = Driver(8, [spec("a", 6), spec("b", 4)])
    driver.arrive(1, "a")
    driver.arrive(2, "b", 2.0)
    driver.arrive(3, "a", 4.0)
    driver.drain()
    assert [page for swap in driver.of(SwapIn) if swap.model == "a" for page in swap.pages] == [*range(6), 4, 5]


def test_rarely_used_model_leaves_before_a_popular_one():
    driver = Driver(6, [spec("popular", 3), spec("rare", 3), spec("new", 3)], prefetch=False)
    for number in range(10):
        driver.arrive(number, "popular", 1.0 + 0.3 * number)
    driver.arrive(20, "rare", 0.5)
    driver.arrive(21, "rare", 3.85)  # used last
    driver.arrive(22, "new", 4.2)
    driver.drain()
    assert {evict.model for evict in driver.of(Evict)} == {"rare"}


def test_model_with_more_waiting_work_for_its_size_comes_first():
    driver = Driver(12, [spec("now", 6), spec("few", 6), spec("many", 6)], step_seconds=1.0, prefetch=False)
    driver.arrive(0, "now")
    driver.arrive(1, "few", 0.1)
    for number in range(4):
        driver.arrive(10 + number, "many", 0.2)
    driver.drain()
    assert [swap.model for swap in driver.of(SwapIn)] == ["now", "many", "few"]


def test_resident_model_is_served_while_another_comes():
    driver = Driver(14, [spec("a", 2), spec("b", 10)])
    for number in range(4):
        driver.arrive(number, "a", 0.5 * number)
    driver.arrive(10, "b", 2.0)
    driver.arrive(11, "b", 4.0)
    driver.arrive(12, "b", 4.5)
    driver.at(5.0, UnloadAsked("b"))
    driver.arrive(13, "b", 6.0)
    driver.arrive(14, "a", 6.4)
    driver.drain()
    assert driver.waits[14] == 0.0
    assert driver.waits[13] < 10 * PAGE_SECONDS


def test_run_starts_before_its_pages_have_come():
    driver = Driver(14, [spec("a", 2), spec("b", 10)], step_seconds=0.2)
    driver.arrive(0, "a")
    driver.arrive(1, "b", 1.0)
    driver.at(3.0, UnloadAsked("b"))
    driver.arrive(2, "b", 4.0)
    driver.drain()
    assert times(driver, Run, "b")[-1] == pytest.approx(4.0 + 1.0 - Tuning().early_start * 0.2)


def test_generation_goes_on_while_a_model_comes_whose_steps_are_unknown():
    models = [spec("a", 2, continuous=True, blocks_per_frame=9.0), spec("b", 10)]
    driver = Driver(20, models, step_seconds=0.1)
    driver.arrive(0, "a", steps=20, blocks=1)
    driver.arrive(1, "b", 0.55)
    driver.drain()
    starts = times(driver, Run, "a")
    assert max(after - before for before, after in itertools.pairwise(starts[1:])) <= 0.2 + 1e-6


def test_model_keeps_its_place_for_as_long_as_its_swap_in_took():
    models = [spec("a", 4, batch=1), spec("b", 4, batch=1)]
    driver = Driver(4, models, step_seconds=0.01, max_wait=100.0)
    for number in range(200):
        driver.arrive(number, "a", 0.001 * number)
        driver.arrive(1000 + number, "b", 0.001 * number)
    driver.drain()
    # The last turn may be shorter: then the work is done.
    swaps = [(time, action.model) for time, action in driver.actions if isinstance(action, SwapIn)]
    turns = [next(pieces)[0] for _, pieces in itertools.groupby(swaps, key=lambda swap: swap[1])]
    gaps = [after - before for before, after in itertools.pairwise(turns[:-1])]
    assert len(gaps) > 3
    assert min(gaps) >= 2 * 4 * PAGE_SECONDS - 0.02


def test_next_wanted_model_takes_its_frames_when_the_link_is_free():
    driver = Driver(8, [spec("a", 4), spec("b", 4)])
    driver.arrive(1, "a")
    driver.arrive(2, "b", 0.1)
    driver.drain()
    assert [swap.urgency for swap in driver.of(SwapIn)] == [Urgency.DEMAND, Urgency.DEMAND]
    assert times(driver, SwapIn, "b") == [pytest.approx(4 * PAGE_SECONDS)]


def test_fetch_ahead_takes_nothing_from_models_that_will_be_wanted_sooner():
    driver = Driver(8, [spec("hot", 2), spec("a", 4), spec("b", 4)], step_seconds=0.01)
    for number in range(20):
        driver.arrive(number, "hot", 0.1 * number)
    driver.arrive(100, "a", 1.0)
    driver.arrive(101, "b", 1.05)
    driver.drain()
    assert not [evict for evict in driver.of(Evict) if evict.model == "hot"]


def test_fetch_ahead_gives_way_to_a_growing_cache():
    models = [spec("a", 1, continuous=True, blocks_per_frame=1.0), spec("c", 10), spec("d", 6)]
    driver = Driver(14, models, step_seconds=0.1, tuning=Tuning(regular=1.0))
    for number in range(3):
        driver.arrive(number, "c", 2.0 * number)
    driver.arrive(10, "d", 4.2)
    driver.arrive(11, "a", 4.8, steps=12, growth=1, blocks=1)
    driver.at(5.05, UnloadAsked("d"))
    driver.drain()
    assert [swap.urgency for swap in driver.of(SwapIn) if swap.model == "c"][1] == Urgency.PREFETCH
    assert driver.of(CancelSwap) == [CancelSwap("c")]
    assert not driver.of(Preempt)
    assert set(driver.outcomes.values()) == {"finished"}


def test_model_with_regular_requests_is_fetched_before_the_next_one():
    driver = Driver(4, [spec("clock", 4), spec("other", 4)], step_seconds=0.05)
    for number in range(8):
        driver.arrive(number, "clock", 10.0 * number)
    for number in range(7):
        driver.arrive(100 + number, "other", 10.0 * number + 3.0 + (number % 3))
    driver.drain()
    assert driver.waits[1] > 0.0
    assert driver.waits[7] == 0.0


@pytest.mark.parametrize("prefetch", [True, False])
def test_model_wanted_often_comes_back_after_one_wanted_seldom(prefetch):
    driver = Driver(4, [spec("often", 4), spec("seldom", 4)], step_seconds=0.01, prefetch=prefetch)
    driver.arrive(100, "seldom")
    for number in range(20):
        driver.arrive(number, "often", 1.0 + 0.1 * number)
    driver.arrive(101, "seldom", 4.0)
    driver.drain()
    fetched = [swap for swap in driver.of(SwapIn) if swap.model == "often" and swap.urgency == Urgency.PREFETCH]
    assert [page for swap in fetched for page in swap.pages] == ([0, 1, 2, 3] if prefetch else [])


@pytest.mark.parametrize("why", ["unloaded", "failed"])
def test_what_was_unloaded_or_failed_is_not_fetched_before_somebody_asks_for_it(why):
    driver = Driver(20, [spec("a", 4), spec("b", 4)])
    driver.arrive(1, "a")
    if why == "unloaded":
        driver.at(2.0, UnloadAsked("a"))
    else:
        driver.failing_swaps = {0, 1, 2}
    driver.arrive(2, "b", 3.0)
    driver.drain()
    assert not [swap for swap in driver.of(SwapIn) if swap.urgency != Urgency.DEMAND]
    driver.arrive(3, "a", 60.0)
    driver.drain()
    assert driver.outcomes[3] == "finished"


def test_generation_goes_on_for_its_time_slice_and_then_others_have_theirs():
    models = [spec("a", 2, continuous=True, blocks_per_frame=9.0), spec("b", 2, continuous=True, blocks_per_frame=9.0)]
    driver = Driver(8, models, step_seconds=0.1, tuning=Tuning(time_slice=0.45))
    driver.arrive(0, "a", steps=15, blocks=1)
    driver.arrive(1, "b", 0.05, steps=15, blocks=1)
    driver.drain()
    turns = [len(list(steps)) for _, steps in itertools.groupby(run.model for run in driver.of(Run))]
    assert turns[1:5] == [5, 5, 5, 5]


def test_two_generations_in_flight_do_not_keep_a_third_model_waiting():
    models = [spec(name, 2, continuous=True, blocks_per_frame=9.0) for name in "abc"]
    driver = Driver(12, models, step_seconds=0.1, max_steps_in_flight=2, tuning=Tuning(time_slice=0.45))
    driver.arrive(0, "a", steps=60, blocks=1)
    driver.arrive(1, "b", 0.05, steps=60, blocks=1)
    driver.arrive(2, "c", 1.0, steps=1, blocks=1)
    driver.drain()
    assert times(driver, Run, "c")[0] < 1.0 + 2 * 0.45 + 2 * 0.1


def test_model_with_work_gives_way_to_older_requests_only_and_then_leaves_as_a_whole():
    def swaps(first, second):
        models = [spec(name, 4, batch=1) for name in (first, second)]
        driver = Driver(6, models, step_seconds=0.5, max_wait=100.0, tuning=Tuning(keep=0.0))
        driver.arrive(0, first)
        for number in range(1, 8):
            driver.arrive(number, first, 0.6 + 0.01 * number)
        driver.arrive(8, second, 0.5 if second == "older" else 0.7)
        driver.drain()
        evicted = [evict for evict in driver.of(Evict) if evict.model == first]
        wanted = [swap.model for swap in driver.of(SwapIn) if swap.urgency == Urgency.DEMAND]
        return [model for model, _ in itertools.groupby(wanted)], evicted[0].pages

    assert swaps("busy", "older") == (["busy", "older", "busy"], (3, 2, 1, 0))
    assert swaps("busy", "younger") == (["busy", "younger"], (3, 2))


def test_lru_evicts_whole_models_the_least_recently_used_first():
    driver = Driver(9, [spec("a", 3), spec("b", 3), spec("c", 3), spec("d", 1)], policy="lru")
    for number, name in enumerate("abca"):
        driver.arrive(number, name, 2.0 * number)
    driver.arrive(9, "d", 10.0)
    driver.drain()
    assert driver.of(Evict)[0].model == "b"
    assert driver.of(Evict)[0].pages == (2, 1, 0)


def test_lru_brings_nothing_before_the_oldest_request():
    driver = Driver(12, [spec("now", 6), spec("few", 6), spec("many", 6)], step_seconds=1.0, policy="lru")
    driver.arrive(0, "now")
    driver.arrive(1, "few", 0.1)
    for number in range(4):
        driver.arrive(10 + number, "many", 0.2)
    driver.drain()
    assert [swap.model for swap in driver.of(SwapIn)] == ["now", "few", "many"]


@pytest.mark.parametrize("pages", [10, 60])
def test_small_and_large_models_do_not_take_pages_from_each_other_all_the_time(pages):
    driver = Driver(pages + 1, [spec("large", pages), spec("small", 1), spec("hot", 1)], max_wait=1000.0)
    chance = random.Random(1)
    for number in range(20):
        driver.arrive(number, "large", 5.0 + 10.0 * number)
        driver.arrive(100 + number, "small", 10.0 * number + chance.uniform(0.0, 10.0))
    for number in range(600):
        driver.arrive(1000 + number, "hot", 0.3 * number)
    driver.run_until(90.0)
    driver.actions.clear()
    driver.run_until(170.0)
    assert len(driver.of(SwapIn)) <= 60, "eight requests to each of the two that lack a page now and then"


@pytest.mark.parametrize("pinned", [True, False])
def test_end_of_a_step_is_not_waited_for_if_its_pages_are_not_enough_or_stay(pinned):
    models = [spec("long", 1, pinned=pinned), spec("idle", 8), spec("wanted", 8)]
    driver = Driver(
        9, models, step_seconds={"long": 5.0, "idle": 0.02, "wanted": 0.02},
        max_wait=1000.0, prefetch=False, max_steps_in_flight=2,
    )  # fmt: skip
    driver.arrive(1, "wanted")
    driver.arrive(2, "long", 4.0)
    for number in range(60):
        driver.arrive(10 + number, "idle", 20.0 + number)
    driver.arrive(3, "long", 80.1)
    driver.arrive(4, "wanted", 80.3)
    driver.drain()
    assert driver.waits[4] <= 8 * PAGE_SECONDS


class Miser(Default):
    """Offers nothing."""

    def offers(self, board, target, idle, now, *, ahead):
        return []


def test_policy_that_offers_nothing_delays_until_the_limit_and_robs_nobody_meanwhile():
    models = [spec("running", 2), spec("idle", 4), spec("busy", 2, batch=1), spec("wanted", 4)]
    seconds = {"running": 40.0, "idle": 0.05, "busy": 0.05, "wanted": 0.05}
    driver = Driver(8, models, policy=Miser(), step_seconds=seconds, max_wait=10.0, prefetch=False)
    driver.arrive(1, "idle")
    driver.arrive(2, "busy", 1.0)
    driver.arrive(3, "running", 2.0)
    driver.arrive(4, "wanted", 3.0)
    driver.arrive(5, "busy", 3.1)
    driver.drain()
    due = 3.0 + 10.0 - (1.0 + Tuning().keep) * 4 * PAGE_SECONDS
    evictions = [(time, action.model) for time, action in driver.actions if isinstance(action, Evict)]
    assert evictions[0] == (pytest.approx(due), "idle")
    assert set(driver.outcomes.values()) == {"finished"}


def test_policy_that_offers_nothing_loses_no_request():
    driver = Driver(4, [spec("a", 4), spec("b", 4)], policy=Miser())
    driver.arrive(1, "a")
    driver.arrive(2, "b", 5.0)
    driver.drain()
    assert set(driver.outcomes.values()) == {"finished"}
