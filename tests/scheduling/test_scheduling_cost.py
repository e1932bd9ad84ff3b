"""What an event costs, in executed instructions: not more for models that do nothing, nor for models of more pages."""

from __future__ import annotations

import sys

import pytest
from driver import Driver
from virtual_device import spec

from computron.scheduling.actions import Run, SwapIn
from computron.scheduling.policies import POLICIES
from computron.scheduling.policies.default import Default

PAGES = 4


def cost(idle_models: int, policy: str, pages: int = PAGES) -> tuple[float, float]:
    """Bytecode instructions of the scheduler for each event of a fixed load, beside so many idle models, and for each
    page that comes.

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
    driver.actions.clear()
    for number in range(60):
        driver.arrive(10**6 + number, f"m{number % 6}", quiet + (1.0 + 0.07 * number) * scale)
    driver.drain()
    return sum(counts) / len(counts), sum(counts) / sum(len(swap.pages) for swap in driver.of(SwapIn))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_cost_of_an_event_does_not_grow_with_idle_models(policy):
    few, many = cost(10, policy), cost(400, policy)
    assert many[0] <= 1.1 * few[0]


def test_cost_of_an_event_does_not_grow_with_pages_where_models_come_as_a_whole():
    few, many = cost(10, "lru"), cost(10, "lru", pages=50 * PAGES)
    assert many[0] <= 1.01 * few[0]


def test_cost_of_a_page_does_not_grow_with_pages_where_each_comes_alone():
    few, many = cost(10, "default"), cost(10, "default", pages=10 * PAGES)
    assert many[1] <= few[1]


class Asked(Default):
    """How often was it asked whom to fetch ahead?"""

    times = 0

    def next_to_fetch(self, board, lacking, now):
        self.times += 1
        return super().next_to_fetch(board, lacking, now)


def test_tokens_of_a_generation_do_not_ask_anew_whom_to_fetch_ahead():
    policy = Asked()
    models = [spec(f"m{number}", 2) for number in range(8)]
    models.append(spec("long", 2, continuous=True, blocks_per_frame=100.0))
    driver = Driver(7, models, policy=policy, step_seconds=0.05, max_wait=1000.0)
    for number in range(8):
        driver.arrive(number, f"m{number}", 2.0 * number)
    driver.arrive(100, "long", 20.0, steps=100, blocks=1)
    driver.run_until(21.0)
    policy.times, before = 0, len(driver.of(Run))
    driver.run_until(24.0)
    assert len(driver.of(Run)) - before > 50
    assert policy.times <= 5
    driver.drain()
