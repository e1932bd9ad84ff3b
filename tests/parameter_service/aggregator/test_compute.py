"""Whose work the compute thread does, and for whom that means waiting."""

from __future__ import annotations

import threading
import time

from computron.parameter_service.aggregator.compute import ComputeThread, Work

BURST = 0.005  # seconds of CPU time


def burn() -> None:
    start = time.thread_time()
    while time.thread_time() - start < BURST:
        pass


def test_waiting_behind_others_work_is_counted_in_cpu_time_and_told_once() -> None:
    ended = threading.Event()
    compute = ComputeThread(lambda works: ended.set() if any(work.owner == "b" for work in works) else None)
    compute.submit(
        *(Work("a", 0.0, burn, lambda work: None) for _ in range(2)), Work("b", 1.0, burn, lambda work: None)
    )
    compute.start()
    try:
        assert ended.wait(10.0)
        assert compute.behind("b") >= 2 * BURST
        assert compute.behind("b") == 0.0
        assert compute.behind("a") == 0.0
    finally:
        compute.stop()
