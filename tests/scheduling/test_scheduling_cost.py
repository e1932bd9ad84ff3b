"""What an event costs, in executed instructions: not more for models that do nothing, nor for models of more pages."""

from __future__ import annotations

import sys

import pytest
from driver import Driver
from virtual_device import spec

from computron.scheduling.policies import POLICIES

PAGES = 4


def cost(idle_models: int, policy: str, pages: int = PAGES) -> float:
    """Bytecode instructions of the scheduler for each event of a fixed load, beside so many idle models.

    All times are in proportion to those of a swap-in, so that the same happens whatever the number of pages.
    """
    scale = pages / PAGES
    models = [spec(f"m{number}", pages, first=1000 * number) for number in range(idle_models + 6)]
    driver = Driver(4 * pages, models, policy=policy, step_seconds=0.05 * scale, max_wait=30.0 * scale)
    handle, counts = driver.scheduler.handle, []

    def counted(event, now):
        executed = 0

        def trace(frame, what, argument):
            nonlocal executed
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            executed += what == "opcode"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return handle(event, now)
        finally:
            sys.settrace(before)
            counts.append(executed)

    for number in range(idle_models):  # all have been used once
        driver.arrive(number, f"m{number + 6}", 0.001 * number * scale)
    quiet = driver.now
    while (following := driver._next_time()) is not None:
        driver._advance(following)
        quiet = driver.now
    driver.scheduler.handle = counted
    for number in range(60):
        driver.arrive(10**6 + number, f"m{number % 6}", quiet + (1.0 + 0.07 * number) * scale)
    driver.drain()
    return sum(counts) / len(counts)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_cost_of_an_event_does_not_grow_with_idle_models(policy):
    few, many = cost(10, policy), cost(400, policy)
    assert many <= 1.1 * few


def test_cost_of_an_event_does_not_grow_with_pages():
    few, many = cost(10, "lru"), cost(10, "lru", pages=50 * PAGES)  # whole models leave, so that the same happens
    assert many <= 1.01 * few
