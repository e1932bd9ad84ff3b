"""Swap-ins and steps that fail, and events that cannot be true."""

from __future__ import annotations

import pytest
from driver import BANDWIDTH, FRAME_BYTES, Driver
from virtual_device import spec

from computron.scheduling.actions import Run, SwapIn
from computron.scheduling.events import (
    ModelAdded,
    ModelRemoved,
    Request,
    RequestArrived,
    StepFinished,
    SwapCancelled,
    SwapFinished,
)
from computron.scheduling.scheduler import InvalidTransition, Scheduler


def test_failed_swap_in_is_tried_again_and_its_requests_answered():
    driver = Driver(4, [spec("a", 2)])
    driver.failing_swaps = {0, 1}
    driver.arrive(1, "a")
    driver.drain()
    assert driver.outcomes == {1: "finished"}
    assert len(driver.of(SwapIn)) == 3


def test_requests_are_rejected_when_the_swap_in_fails_for_good():
    driver = Driver(4, [spec("a", 2)])
    driver.failing_swaps = {0, 1, 2}
    driver.arrive(1, "a")
    driver.arrive(2, "a", 0.1)
    driver.drain()
    assert driver.outcomes == {1: "swap_failed", 2: "swap_failed"}
    assert len(driver.of(SwapIn)) == 3


def test_request_whose_step_waits_for_a_swap_in_given_up_is_rejected_too():
    driver = Driver(4, [spec("b", 1), spec("a", 2)])
    driver.failing_swaps = {1, 2, 3}
    driver.arrive(0, "b")
    driver.arrive(1, "a", 1.0)
    driver.drain()
    assert driver.outcomes == {0: "finished", 1: "swap_failed"}
    assert len(driver.of(SwapIn)) == 4


def test_model_works_again_after_its_swap_in_failed_for_good():
    driver = Driver(4, [spec("a", 2)])
    driver.failing_swaps = {0, 1, 2, 3}
    driver.arrive(1, "a")
    driver.arrive(2, "a", 5.0)
    driver.drain()
    assert driver.outcomes == {1: "swap_failed", 2: "finished"}


def test_others_are_served_while_one_model_cannot_be_brought():
    driver = Driver(4, [spec("a", 2), spec("b", 2)])
    driver.failing_swaps = {0, 1, 2}
    driver.arrive(1, "a")
    driver.arrive(2, "b", 0.05)
    driver.drain()
    assert driver.outcomes[2] == "finished"


def test_failed_step_loses_its_own_requests_only():
    driver = Driver(4, [spec("a", 2, batch=1)])
    driver.failing_steps = {0}
    driver.arrive(1, "a")
    driver.arrive(2, "a", 0.01)
    driver.drain()
    assert driver.outcomes == {1: "failed", 2: "finished"}


def test_contradictory_events_raise_and_tell_the_history():
    scheduler = Scheduler(frames=4, frame_bytes=FRAME_BYTES, link_bandwidth_hint=BANDWIDTH)
    scheduler.handle(ModelAdded(spec("a", 2)), 0.0)
    for event in [
        StepFinished("a", (1,), 0.1),
        SwapFinished("a", (0, 1), 0.1),
        SwapCancelled("a", (0, 1), ()),
        ModelAdded(spec("a", 2)),
        ModelRemoved("b"),
    ]:
        with pytest.raises(InvalidTransition, match=r"Before it:\n  0.000000 ModelAdded"):
            scheduler.handle(event, 1.0)
    scheduler.handle(RequestArrived(Request(1, "a", 1.0)), 1.0)
    with pytest.raises(InvalidTransition, match="there is a request with this id"):
        scheduler.handle(RequestArrived(Request(1, "a", 1.0)), 1.0)
    with pytest.raises(InvalidTransition, match="the transfer under way is of pages"):
        scheduler.handle(SwapFinished("a", (0, 1, 2), 0.1), 1.0)
    with pytest.raises(InvalidTransition, match="time went back"):
        scheduler.handle(SwapFinished("a", (0, 1), 0.1), 0.5)
    with pytest.raises(InvalidTransition, match="a step or a transfer under way"):
        scheduler.handle(ModelRemoved("a"), 1.0)
    scheduler.check()


def test_step_cannot_finish_requests_that_were_not_in_it():
    scheduler = Scheduler(frames=4, frame_bytes=FRAME_BYTES, link_bandwidth_hint=BANDWIDTH)
    scheduler.handle(ModelAdded(spec("a", 2, continuous=True, blocks_per_frame=1.0)), 0.0)
    scheduler.handle(RequestArrived(Request(1, "a", 0.0, cache_blocks=1)), 0.0)
    scheduler.handle(SwapFinished("a", (0, 1), 0.1), 0.1)
    with pytest.raises(InvalidTransition, match=r"requests \[7\] are not in it"):
        scheduler.handle(StepFinished("a", (7,), 0.1, {1: 1}), 0.2)


def test_request_that_made_no_progress_is_in_the_next_step_with_the_same_cache():
    scheduler = Scheduler(frames=4, frame_bytes=FRAME_BYTES, link_bandwidth_hint=BANDWIDTH)
    scheduler.handle(ModelAdded(spec("a", 2, continuous=True, blocks_per_frame=1.0)), 0.0)
    scheduler.handle(RequestArrived(Request(1, "a", 0.0, cache_blocks=1)), 0.0)
    scheduler.handle(SwapFinished("a", (0, 1), 0.1), 0.1)
    assert scheduler.handle(StepFinished("a", (), 0.1), 0.2) == [Run("a", (1,))]
    assert scheduler.cache_frames("a") == 1


def test_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="no policy 'fifo'; there are default, lru"):
        Scheduler(frames=4, frame_bytes=FRAME_BYTES, link_bandwidth_hint=BANDWIDTH, policy="fifo")
