"""Several steps of a model at once, in the stages of a pipeline, where one pass answers its requests."""

from __future__ import annotations

from itertools import pairwise

import pytest
from driver import BANDWIDTH, FRAME_BYTES, PAGE_SECONDS, Driver
from virtual_device import spec

from computron.scheduling.actions import Run
from computron.scheduling.events import (
    ModelAdded,
    Request,
    RequestArrived,
    RequestCancelled,
    StageFreed,
    StepAborted,
    StepFailed,
    StepFinished,
    SwapFinished,
)
from computron.scheduling.policies.default import Default
from computron.scheduling.scheduler import InvalidTransition, Scheduler

STEP = 0.4


def runs(driver: Driver, since: float = 0.0) -> list[tuple[float, tuple[int, ...]]]:
    return [
        (round(time, 6), action.requests) for time, action in driver.actions if isinstance(action, Run) if time >= since
    ]


def resident(stages: int = 2, **options: object) -> Driver:
    """A driver, and a model "a" of two pages that takes one request a step and has answered one."""
    driver = Driver(8, [spec("a", 2, batch=1)], step_seconds=STEP, max_steps_in_flight=stages, **options)
    driver.arrive(100, "a")
    driver.drain()
    return driver


def test_the_next_step_starts_when_the_first_stage_is_done_with_the_last_one():
    driver = resident()
    for request in range(4):
        driver.arrive(request, "a", 10.0)
    driver.drain()
    assert runs(driver, 10.0) == [(10.0, (0,)), (10.2, (1,)), (10.4, (2,)), (10.6, (3,))]


def test_a_request_that_comes_when_the_first_stage_is_free_starts_at_once():
    driver = resident()
    driver.arrive(0, "a", 10.0)
    driver.arrive(1, "a", 10.1)
    driver.arrive(2, "a", 10.45)
    driver.drain()
    assert runs(driver, 10.0) == [(10.0, (0,)), (10.2, (1,)), (10.45, (2,))]


@pytest.mark.parametrize(("stages", "tells"), [(1, True), (2, False)])
def test_where_no_stage_is_free_steps_follow_each_other(stages, tells):
    driver = resident(stages, tells_stages=tells)
    for request in range(3):
        driver.arrive(request, "a", 10.0)
    driver.drain()
    assert runs(driver, 10.0) == [(10.0, (0,)), (10.4, (1,)), (10.8, (2,))]


def test_no_more_steps_are_under_way_than_there_are_stages():
    driver = Driver(8, [spec("a", 2, batch=1), spec("b", 2, batch=1)], step_seconds=STEP, max_steps_in_flight=2)
    driver.arrive(100, "a")
    driver.arrive(101, "b")
    driver.drain()
    for request in range(3):
        driver.arrive(request, "a", 50.0)
    driver.arrive(3, "b", 50.1)
    driver.drain()  # which counts them
    assert runs(driver, 50.0) == [(50.0, (0,)), (50.1, (3,)), (50.4, (1,)), (50.6, (2,))]


def test_a_generation_has_one_step_at_a_time():
    model = spec("a", 2, batch=1, continuous=True, blocks_per_frame=1.0)
    driver = Driver(8, [model], step_seconds=STEP, max_steps_in_flight=2)
    driver.arrive(0, "a", blocks=1, steps=2)
    driver.arrive(1, "a", blocks=1)
    driver.drain()
    times = [time for time, _ in runs(driver)]
    assert len(times) == 3
    assert all(after - before > STEP - 1e-9 for before, after in pairwise(times))


def test_each_step_has_a_batch_of_its_own():
    driver = Driver(8, [spec("a", 2, batch=2)], step_seconds=STEP, max_steps_in_flight=2)
    driver.arrive(100, "a")
    driver.drain()
    for request in range(4):
        driver.arrive(request, "a", 10.0)
    driver.drain()
    assert runs(driver, 10.0) == [(10.0, (0,)), (10.2, (1, 2)), (10.4, (3,))]


def test_a_step_that_waits_for_pages_has_no_other_behind_it():
    """The first stage may have its pages, and be done, before the later ones have theirs."""
    scheduler = started()
    scheduler.handle(StepFinished("a", (0,), STEP), 1.0)
    for request in (1, 2):
        scheduler.handle(RequestArrived(Request(request, "b", 1.0)), 1.0)
    assert scheduler.handle(StageFreed("b"), 1.1) == []
    assert scheduler.handle(SwapFinished("b", (0, 1), 0.2), 1.2) == [Run("b", (2,))]


def started() -> Scheduler:
    """Two models without a timed step, "a" resident with one step."""
    scheduler = Scheduler(frames=8, frame_bytes=FRAME_BYTES, link_bandwidth_hint=BANDWIDTH, max_steps_in_flight=3)
    for name in "ab":
        scheduler.handle(ModelAdded(spec(name, 2, batch=1)), 0.0)
    scheduler.handle(RequestArrived(Request(0, "a", 0.0)), 0.0)
    scheduler.handle(SwapFinished("a", (0, 1), 0.2), 0.2)
    return scheduler


def overlapped() -> Scheduler:
    """Requests 0 and 1 of "a" are in a step each, 2 waits, and the first stage computes for 1."""
    scheduler = started()
    for request in (1, 2):
        assert scheduler.handle(RequestArrived(Request(request, "a", 0.2)), 0.2) == []
    assert scheduler.handle(StageFreed("a"), 0.3) == [Run("a", (1,))]
    scheduler.check()
    return scheduler


def test_a_cancelled_request_leaves_with_the_step_that_it_is_in():
    scheduler = overlapped()
    assert scheduler.handle(RequestCancelled(1), 0.35) == []
    scheduler.handle(StepFinished("a", (0,), STEP), 0.4)
    assert scheduler.running_count("a") == 1
    scheduler.handle(StageFreed("a"), 0.4)
    scheduler.handle(StepFinished("a", (), STEP), 0.5)
    scheduler.check()
    assert scheduler.running_count("a") == 1, "the third one"


def test_a_step_that_fails_takes_nobody_else_along():
    scheduler = overlapped()
    assert scheduler.handle(StepFailed("a", (0,)), 0.35) == []
    assert (scheduler.running_count("a"), scheduler.queue_depth("a"), scheduler.state("a")) == (1, 1, "running")
    assert scheduler.handle(StepFinished("a", (1,), STEP), 0.5) == [Run("a", (2,))]
    scheduler.check()


def test_the_requests_of_an_aborted_step_wait_again():
    scheduler = overlapped()
    scheduler.handle(RequestCancelled(0), 0.3)
    scheduler.handle(RequestArrived(Request(3, "a", 0.3)), 0.3)
    assert scheduler.handle(StepAborted("a"), 0.35) == []
    assert (scheduler.running_count("a"), scheduler.queue_depth("a")) == (1, 2)
    assert scheduler.handle(StepAborted("a"), 0.5) == [Run("a", (1,))]
    scheduler.check()


@pytest.mark.parametrize("event", [StepFinished("a", (1,), STEP), StepFailed("a", (1,))])
def test_steps_end_in_their_order(event):
    with pytest.raises(InvalidTransition, match=r"requests \[1\] are not in it"):
        overlapped().handle(event, 0.4)


def test_a_stage_cannot_be_free_of_a_step_that_is_not():
    scheduler = started()
    with pytest.raises(InvalidTransition, match="no step of this model is under way"):
        scheduler.handle(StageFreed("b"), 0.3)


class Stubborn(Default):
    def may_take(self, board, target, victim, now):
        return False


def test_a_model_that_never_pauses_gives_its_frames_to_one_that_is_due():
    driver = Driver(
        3, [spec("a", 2, batch=1), spec("b", 2, batch=1)],
        policy=Stubborn(), step_seconds=STEP, max_steps_in_flight=2, max_wait=3.0,
    )  # fmt: skip
    for request in range(100):
        driver.arrive(request, "a", 0.25 * request)
    driver.arrive(1000, "b", 5.0)
    driver.drain()
    assert 2.0 < driver.waits[1000] <= 3.0 + STEP + 2 * PAGE_SECONDS


def test_a_model_that_never_pauses_gives_its_frames_when_the_policy_says_so():
    """As soon as the other's request has waited for as long as the change costs, as it would between two steps."""
    driver = Driver(3, [spec("a", 2, batch=1), spec("b", 2, batch=1)], step_seconds=STEP, max_steps_in_flight=2)
    for request in range(100):
        driver.arrive(request, "a", 0.25 * request)
    driver.arrive(1000, "b", 5.0)
    driver.drain()
    assert driver.waits[1000] < 2.0
