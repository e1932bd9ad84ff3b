"""Whose work the compute thread does, and for whom that means waiting."""

from __future__ import annotations

import threading
import time
from functools import partial

from computron.parameter_service.aggregator.compute import FIRST, ComputeThread, Work

BURST = 0.005  # seconds of CPU time


def burn() -> None:
    start = time.thread_time()
    while time.thread_time() - start < BURST:
        pass


def test_waiting_behind_others_work_is_counted_in_cpu_time_and_told_once() -> None:
    ended = threading.Event()
    compute = ComputeThread(lambda works: ended.set() if any(work.owner == "b" for work in works) else None)
    compute.submit(
        *(Work("a", 0.0, 1.0, BURST, burn, lambda work: None) for _ in range(2)),
        Work("b", 1.0, 1.0, 3 * BURST, burn, lambda work: None),
    )
    compute.start()
    try:
        assert ended.wait(10.0)
        assert compute.behind("b") >= 2 * BURST
        assert compute.behind("b") == 0.0
        assert compute.behind("a") == 0.0
    finally:
        compute.stop()


def order_of(*works: Work) -> list[object]:
    """Owners, in the order in which their work is done."""
    ended = threading.Event()
    done: list[object] = []

    def deliver(finished: list[Work]) -> None:
        done.extend(work.owner for work in finished)
        if len(done) == len(works):
            ended.set()

    compute = ComputeThread(deliver)
    compute.submit(*works)
    compute.start()
    try:
        assert ended.wait(10.0)
    finally:
        compute.stop()
    return done


def work(owner: str, late: float, *, allowance: float = 1000.0, expected: float = 1.0) -> Work:
    return Work(owner, time.monotonic() - late, allowance, expected, lambda: None, lambda work: None)


def test_who_has_the_least_left_comes_first() -> None:
    short, long = work("short", -1000.0, expected=3.0), work("long", -10.0, expected=4.0)
    assert order_of(long, short) == ["short", "long"]
    parts = [work("long", -10.0, expected=2.0) for _ in range(3)]
    assert order_of(*parts, short) == ["short", "long", "long", "long"]
    assert order_of(*parts[:2], work("short", -10.0, expected=2.5), parts[2]) == ["short", "long", "long", "long"]


def test_what_is_late_goes_before_that_by_what_it_may_lose() -> None:
    assert order_of(work("long", 1000.0, expected=4.0), work("short", -10.0)) == ["long", "short"]
    late = work("long", 2000.0, expected=4.0)
    assert order_of(late, work("short", 50.0, allowance=10.0)) == ["short", "long"]
    assert order_of(late, work("short", 15.0, allowance=10.0)) == ["long", "short"]


def test_what_comes_first_does_so_whatever_is_late() -> None:
    first = Work("a", FIRST, 1e-3, 0.0, lambda: None, lambda work: None)
    assert order_of(work("late", 1e6, allowance=1e-3), first) == ["a", "late"]


def test_an_owners_work_is_done_in_the_order_in_which_it_came() -> None:
    ran: list[int] = []
    order_of(*(Work("a", 0.0, 1.0, 1.0, partial(ran.append, number), lambda work: None) for number in range(5)))
    assert ran == [0, 1, 2, 3, 4]
