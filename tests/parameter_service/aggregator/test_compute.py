"""Whose work the compute thread does, and for whom that means waiting."""

from __future__ import annotations

import threading
import time

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
        *(Work("a", 0.0, 1.0, burn, lambda work: None) for _ in range(2)), Work("b", 1.0, 1.0, burn, lambda work: None)
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


def work(owner: str, late: float, allowance: float) -> Work:
    return Work(owner, time.monotonic() - late, allowance, lambda: None, lambda work: None)


def test_who_can_wait_the_least_comes_first_and_among_late_ones_who_is_late_by_most_of_what_it_may() -> None:
    assert order_of(work("long", -1000.0, 1000.0), work("short", -10.0, 1000.0)) == ["short", "long"]
    assert order_of(work("long", 2000.0, 1000.0), work("short", 50.0, 10.0)) == ["short", "long"]
    assert order_of(work("long", 8000.0, 1000.0), work("short", 50.0, 10.0)) == ["long", "short"]


def test_what_comes_first_does_so_whatever_is_late() -> None:
    assert order_of(work("late", 1e6, 1e-3), Work("a", FIRST, 1e-3, lambda: None, lambda work: None)) == ["a", "late"]


def test_an_owners_work_is_done_in_the_order_in_which_it_came() -> None:
    ran: list[int] = []
    works = [Work("a", 0.0, 1.0, lambda number=number: ran.append(number), lambda work: None) for number in range(5)]
    order_of(*works)
    assert ran == [0, 1, 2, 3, 4]
