"""Swap-ins in pieces: what comes with each, who leaves for it, and what the link does next."""

from __future__ import annotations

import itertools
import math

import pytest
from driver import PAGE_SECONDS, Driver
from virtual_device import spec

from computron.scheduling.actions import CancelSwap, Evict, Run, SwapIn, Urgency
from computron.scheduling.events import LoadAsked, UnloadAsked
from computron.scheduling.policies.default import Default
from computron.scheduling.tuning import Tuning

BEGIN = 100.0  # all models have been served once, and unloaded


def known(frames, models, *, piece=PAGE_SECONDS, prefetch=False, **more):
    """A driver that knows how long the steps of all models take, with nothing on its device."""
    tuning = Tuning(piece=piece)
    driver = Driver(frames, models, prefetch=prefetch, tuning=tuning, **({"max_wait": 1000.0} | more))
    for number, model in enumerate(models):
        driver.arrive(10_000 + number, model.model, 5.0 * number)
        driver.at(5.0 * number + 4.0, UnloadAsked(model.model))
    driver.run_until(max(BEGIN - 1.0, 5.0 * len(models)))
    driver.actions.clear()
    return driver


def swaps(driver, model=None):
    """(time, pages) of the transfers of one model, (time, model) of all."""
    found = [(round(time, 6), action) for time, action in driver.actions if isinstance(action, SwapIn)]
    if model is None:
        return [(time, action.model) for time, action in found]
    return [(time, action.pages) for time, action in found if action.model == model]


@pytest.mark.parametrize("shared", [False, True])
def test_pieces_come_one_after_the_other_and_victims_leave_with_them(shared):
    a = spec("a", (1, 2, 3, 4)) if shared else spec("a", 4)
    models = [a, spec("b", (4, 11, 12, 13)) if shared else spec("b", 4)]
    driver = known(6, models, piece=2 * PAGE_SECONDS)
    driver.arrive(1, "a", BEGIN)
    driver.arrive(2, "b", BEGIN + 5.0)
    driver.drain()
    assert swaps(driver, "a") == [(BEGIN, (0, 1)), (BEGIN + 0.2, (2, 3))]
    if shared:  # page 0 of b is on the device
        assert swaps(driver, "b") == [(BEGIN + 5.0, (0, 1, 2)), (BEGIN + 5.2, (3,))]
        assert driver.of(Evict) == [Evict("a", (2,), "demand")]
    else:
        assert swaps(driver, "b") == [(BEGIN + 5.0, (0, 1)), (BEGIN + 5.2, (2, 3))]
        assert [(time, action.pages) for time, action in driver.actions if isinstance(action, Evict)] == [
            (pytest.approx(BEGIN + 5.2), (3, 2))
        ]


def test_victim_asked_for_meanwhile_lacks_only_what_the_pieces_have_taken():
    driver = known(8, [spec("a", 8), spec("b", 8)])
    driver.arrive(1, "a", BEGIN)
    driver.arrive(2, "b", BEGIN + 5.0)
    driver.arrive(3, "a", BEGIN + 5.25)
    driver.run_until(BEGIN + 5.25)
    assert driver.scheduler.resident_fraction("a") == 5 / 8
    driver.drain()
    assert set(driver.outcomes.values()) == {"finished"}


def test_victim_that_lost_pages_and_is_asked_for_loses_no_more_than_each_piece_needs():
    driver = known(8, [spec("a", 8), spec("b", 8)], step_seconds={"a": 2.0, "b": 0.05})
    driver.arrive(1, "b", BEGIN)
    driver.arrive(2, "a", BEGIN + 5.0)
    driver.arrive(3, "a", BEGIN + 20.0)
    driver.arrive(4, "b", BEGIN + 20.01)  # b waits for the end of a step, and then nothing overtakes it any more
    driver.arrive(5, "a", BEGIN + 22.25)
    driver.run_until(BEGIN + 22.5)
    driver.actions.clear()
    driver.run_until(BEGIN + 22.75)
    assert [action.pages for action in driver.of(Evict)] == [(1,), (0,)]
    driver.drain()


def test_rest_that_a_complete_model_with_work_gives_its_frames_for_comes_as_a_whole():
    models = [spec("a", 4), spec("b", 8), spec("c", 4, batch=1)]
    driver = known(8, models, step_seconds={"a": 0.5, "b": 0.05, "c": 0.05})
    driver.arrive(1, "a", BEGIN)  # is asked for no more
    driver.arrive(2, "c", BEGIN + 3.0)
    driver.arrive(3, "b", BEGIN + 5.0)
    for number in range(20):
        driver.arrive(10 + number, "c", BEGIN + 5.15)
    driver.drain()
    assert Evict("c", (3, 2, 1, 0), "demand") in driver.of(Evict)
    assert [pages for _, pages in swaps(driver, "b")] == [(0,), (1,), (2,), (3,), (4, 5, 6, 7)]


def test_link_decides_anew_after_each_piece():
    driver = known(9, [spec("big", 8), spec("small", 1)])
    driver.arrive(1, "big", BEGIN)
    driver.arrive(2, "small", BEGIN + 0.25)
    driver.drain()
    assert swaps(driver, "small") == [(BEGIN + 0.3, (0,))]
    assert driver.waits[2] == pytest.approx(0.05 + PAGE_SECONDS - Tuning().early_start * 0.05)
    assert driver.waits[1] > 8 * PAGE_SECONDS


def test_swap_in_that_has_begun_is_not_overtaken_for_ever():
    small = [spec(f"small{number}", 1) for number in range(12)]
    driver = known(20, [spec("big", 8), *small])
    driver.arrive(0, "big", BEGIN)
    for number in range(12):
        driver.arrive(1 + number, f"small{number}", BEGIN + 0.05 + 0.1 * number)
    driver.drain()
    order = [(model, len(list(pieces))) for model, pieces in itertools.groupby(model for _, model in swaps(driver))]
    place = order.index(("big", 7))  # from then on it goes on to the end
    assert order[0] == ("big", 1)
    patient = BEGIN + Tuning().patience * 8 * PAGE_SECONDS
    assert swaps(driver)[place][0] == pytest.approx(patient, abs=PAGE_SECONDS + 1e-6)
    assert {model for model, _ in order[place + 1 :]} == {f"small{number}" for number in range(8, 12)}


def hot_pair(driver, begin):
    """Two models that fill the device of 16 frames are asked for in turn, ten times a second together."""
    for number in range(200):
        driver.arrive(number, f"hot{number % 2}", begin + 0.1 * number)


def test_models_asked_for_all_the_time_do_not_keep_a_third_one_out():
    driver = known(16, [spec("hot0", 8), spec("hot1", 8), spec("seldom", 8)], step_seconds=0.01)
    hot_pair(driver, BEGIN)  # after the pause before, nobody can be sure of their next requests
    driver.arrive(1000, "seldom", BEGIN + 15.02)
    driver.drain()
    assert len(swaps(driver, "seldom")) > 1
    assert driver.waits[1000] <= 3 * 8 * PAGE_SECONDS


def test_what_only_models_leave_for_that_are_sure_to_be_missed_comes_as_a_whole():
    models = [spec("hot0", 8), spec("hot1", 8), spec("seldom", 8)]
    driver = Driver(16, models, step_seconds=0.01, max_wait=1000.0, tuning=Tuning(piece=PAGE_SECONDS))
    driver.arrive(1001, "seldom")
    driver.run_until(5.0)
    hot_pair(driver, 5.0)
    driver.arrive(1000, "seldom", 20.02)
    driver.run_until(20.0)
    driver.actions.clear()
    driver.run_until(20.05)
    assert [len(pages) for _, pages in swaps(driver, "seldom")] == [8]
    driver.drain()


@pytest.mark.parametrize("why", ["due", "lru", "unknown", "infinite"])
def test_some_swap_ins_come_as_a_whole(why):
    more = {"due": {"max_wait": 0.0}, "lru": {"policy": "lru"}, "infinite": {"piece": math.inf}}.get(why, {})
    driver = known(8, [] if why == "unknown" else [spec("a", 6)], **more)
    if why == "unknown":
        driver = Driver(8, [spec("a", 6)])
    driver.arrive(1, "a", BEGIN)
    driver.drain()
    assert swaps(driver, "a") == [(BEGIN, (0, 1, 2, 3, 4, 5))]


def test_what_models_with_work_give_is_filled_at_once():
    driver = known(6, [spec("busy", 4, batch=1), spec("older", 4)], step_seconds=0.5)
    driver.arrive(0, "busy", BEGIN)
    for number in range(1, 8):
        driver.arrive(number, "busy", BEGIN + 0.6 + 0.01 * number)
    driver.arrive(8, "older", BEGIN + 0.5)
    driver.drain()
    assert driver.of(Evict)[0] == Evict("busy", (3, 2, 1, 0), "demand")
    assert swaps(driver, "older")[0][1] == (0, 1, 2, 3)


def test_due_model_whose_piece_is_on_its_way_gets_all_the_rest_with_the_next_one():
    driver = known(10, [spec("a", 8)], max_wait=4.0)
    lead = (1.0 + Tuning().keep) * 8 * PAGE_SECONDS
    driver.at(BEGIN, LoadAsked("a"))
    driver.arrive(1, "a", BEGIN + 0.25, deadline=BEGIN + 0.45 + lead)  # due in the middle of a piece
    driver.drain()
    assert [pages for _, pages in swaps(driver, "a")] == [(0,), (1,), (2,), (3,), (4,), (5, 6, 7)]
    assert swaps(driver, "a")[-1][0] == BEGIN + 0.5


def test_step_starts_early_behind_the_last_piece():
    driver = known(8, [spec("a", 8)], step_seconds=0.2)
    driver.arrive(1, "a", BEGIN)
    driver.drain()
    hides = Tuning().early_start * 0.2
    assert [len(pages) for _, pages in swaps(driver, "a")] == [1, 1, 1, 1, 1, 3], "the last one hides behind the step"
    runs = [time for time, action in driver.actions if isinstance(action, Run)]
    assert runs == [pytest.approx(BEGIN + 8 * PAGE_SECONDS - hides)]


def test_each_stage_of_a_pipeline_waits_for_its_own_pages():
    driver = known(8, [spec("a", 8)], step_seconds=0.4, max_steps_in_flight=2)
    driver.arrive(1, "a", BEGIN)
    driver.drain()
    runs = [time for time, action in driver.actions if isinstance(action, Run)]
    assert runs == [pytest.approx(BEGIN + 8 * PAGE_SECONDS - Tuning().early_start * 0.4 / 2)]


def test_turn_pays_for_all_pieces():
    models = [spec("a", 6, batch=1), spec("b", 6, batch=1)]
    driver = known(6, models, step_seconds=0.01)
    for number in range(300):
        driver.arrive(number, "a", BEGIN + 0.001 * number)
        driver.arrive(1000 + number, "b", BEGIN + 0.001 * number)
    driver.run_until(BEGIN + 6 * PAGE_SECONDS)
    for time in range(1, 6):
        driver.run_until(BEGIN + 6 * PAGE_SECONDS + time * PAGE_SECONDS)
        assert driver.scheduler.resident_fraction("a") == 1.0
    driver.drain()


def test_pages_that_came_stay_when_nobody_waits_any_more():
    driver = known(8, [spec("a", 8), spec("b", 8)])
    driver.arrive(1, "a", BEGIN)
    driver.cancel(1, BEGIN + 0.35)
    driver.run_until(BEGIN + 3.0)
    assert driver.scheduler.resident_fraction("a") == 4 / 8
    assert driver.outcomes[1] == "cancelled"
    assert not driver.of(CancelSwap)
    driver.arrive(2, "a", BEGIN + 3.0)
    driver.drain()
    assert swaps(driver, "a")[4] == (BEGIN + 3.0, (4,))


def test_piece_that_fails_is_tried_again_and_what_came_before_stays():
    driver = known(8, [spec("a", 6)])
    driver.failing_swaps = {3, 4, 6}  # the first one was 0
    driver.arrive(1, "a", BEGIN)
    driver.drain()
    assert driver.outcomes[1] == "finished"
    assert [pages for _, pages in swaps(driver, "a")] == [(0,), (1,), (2,), (2,), (2,), (3,), (3,), (4,), (5,)]


def test_piece_that_fails_for_good_ends_what_waits():
    driver = known(8, [spec("a", 6)])
    driver.failing_swaps = {3, 4, 5}
    driver.arrive(1, "a", BEGIN)
    driver.arrive(2, "a", BEGIN + 5.0)
    driver.drain()
    assert (driver.outcomes[1], driver.outcomes[2]) == ("swap_failed", "finished")


def test_fetch_ahead_is_overtaken_after_its_piece_and_goes_on_afterwards():
    models = [spec("clock", 8), spec("other", 6)]
    driver = Driver(8, models, step_seconds=0.01, max_wait=1000.0, tuning=Tuning(piece=PAGE_SECONDS))
    driver.arrive(100, "other")
    for number in range(12):
        driver.arrive(number, "clock", 10.0 * number)
    driver.arrive(101, "other", 93.0)
    driver.run_until(93.0)
    driver.actions.clear()
    driver.arrive(102, "other", 93.25)  # while the clock's third piece comes back
    driver.run_until(100.0)
    came = [(swap.model, swap.urgency, swap.pages) for swap in driver.of(SwapIn)]
    place = next(place for place, (model, _, _) in enumerate(came) if model == "other")
    rest = next(place for place in range(place, len(came)) if came[place][0] == "clock")
    assert place == 3
    assert {urgency for _, urgency, _ in came[place:rest]} == {Urgency.DEMAND}
    fetched = [*came[:place], *came[rest:]]
    assert {(model, urgency) for model, urgency, _ in fetched} == {("clock", Urgency.PREFETCH)}
    assert [pages for _, _, pages in came[rest:]] == [(2,), (3,), (4,), (5,), (6,), (7,)], (
        "what came has left for others"
    )
    driver.drain()


def test_first_piece_waits_until_there_is_room_for_all():
    models = [spec("long", 4, continuous=True, blocks_per_frame=4.0), spec("a", 4)]
    driver = known(6, models)
    driver.arrive(1, "long", BEGIN, steps=40, blocks=1)
    driver.arrive(2, "a", BEGIN + 1.0)
    driver.drain()
    end = max(time for time, action in driver.actions if isinstance(action, Run) and action.model == "long")
    assert swaps(driver, "a")[0][0] >= end, "a page of it would only have kept a frame"


class Asked(Default):
    """How often was it asked who leaves?"""

    def __init__(self):
        self.times = []

    def offers(self, board, target, idle, now, *, ahead):
        self.times.append((round(now, 6), target.name))
        return super().offers(board, target, idle, now, ahead=ahead)


def test_who_leaves_is_asked_anew_only_if_something_has_happened():
    policy = Asked()
    driver = known(16, [spec("a", 8), spec("b", 8), spec("c", 8)], policy=policy)
    driver.arrive(1, "b", BEGIN)
    driver.arrive(2, "c", BEGIN + 2.0)
    driver.arrive(3, "a", BEGIN + 4.0)
    driver.arrive(4, "b", BEGIN + 4.35)
    driver.drain()
    pieces = [time for time, _ in swaps(driver, "a") if time < BEGIN + 4.9]
    assert len(pieces) == 8
    asked = [time for time, name in policy.times if name == "a"]
    assert asked
    assert len(asked) <= 3, "before the first piece, and after the request in between"
    assert {action.model for action in driver.of(Evict)} <= {"b", "c", "a"}
