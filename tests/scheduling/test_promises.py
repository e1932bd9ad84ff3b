"""Models in a pipeline that never pause, and others that want their frames."""

from __future__ import annotations

import pytest
from driver import PAGE_SECONDS, Driver
from virtual_device import spec

from computron.scheduling.policies import POLICIES

STEP = 0.4


def busy_pipeline(models, frames, *, gap, until=60.0, stages=2, **options):
    """A driver whose pipeline has steps of "a", of two pages, all the time from 10 s on, and how many requests that is.

    The others have been served once before.
    """
    seconds = {"a": STEP} | {model.model: 0.05 for model in models}
    driver = Driver(
        frames, [spec("a", 2, batch=1), *models], step_seconds=seconds,
        max_steps_in_flight=stages, prefetch=False, step_limit=50_000, **({"max_wait": 60.0} | options),
    )  # fmt: skip
    for number, model in enumerate(models):
        driver.arrive(10**6 + number, model.model, 1.0 * number, blocks=1 if model.blocks_per_frame else 0)
    count = int((until - 10.0) / gap)
    for number in range(count):
        driver.arrive(number, "a", 10.0 + gap * number)
    return driver, count


def waits(driver, count):
    return [driver.waits[number] for number in range(count)]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("tells_stages", [True, False])
def test_resident_model_that_lacks_frames_for_its_cache_gets_them(policy, tells_stages):
    models = [spec("c", 3, batch=1, continuous=True, blocks_per_frame=1.0)]
    driver, _ = busy_pipeline(models, 5, gap=0.19, policy=policy, max_wait=3.0, tells_stages=tells_stages)
    driver.arrive(2000, "c", 12.0, blocks=1)
    driver.drain()
    assert driver.waits[2000] <= 3.0 + STEP + 3 * PAGE_SECONDS


@pytest.mark.parametrize(("stages", "gap"), [(3, 0.16), (2, 0.22)])
def test_what_gathers_behind_a_promise_does_not_take_it_back(stages, gap):
    driver, count = busy_pipeline([spec("t", 2)], 3, gap=gap, stages=stages)
    driver.arrive(2000, "t", 20.0)
    driver.drain()
    assert driver.waits[2000] < 4.0
    assert max(waits(driver, count)) < 4.0


@pytest.mark.parametrize("gap", [0.22, 0.25, 0.3])
def test_promise_holds_while_the_link_brings_what_fits_elsewhere(gap):
    driver, count = busy_pipeline([spec("t", 2), spec("u", 1), spec("w", 1)], 3, gap=gap)
    for number in range(450):
        driver.arrive(3000 + number, "uw"[number % 2], 12.0 + 0.11 * number)
    driver.arrive(2000, "t", 20.0)
    driver.drain()
    assert driver.waits[2000] < 5.0
    assert max(waits(driver, count)) < 8.0


def test_due_model_gets_the_pages_of_models_that_never_pause_at_the_same_time():
    models = [spec("a", 2, batch=1), spec("b", 2, batch=1), spec("t", 4)]
    seconds = {"a": STEP, "b": STEP, "t": 0.05}
    driver = Driver(
        4, models, step_seconds=seconds, max_steps_in_flight=2, max_wait=3.0, prefetch=False, tells_stages=False
    )
    for number in range(100):
        driver.arrive(number, "a", 10.0 + 1.02 * STEP * number)
        driver.arrive(1000 + number, "b", 10.2 + 1.02 * STEP * number)
    driver.arrive(2000, "t", 20.0)
    driver.drain()
    assert driver.waits[2000] <= 3.0 + STEP + 4 * PAGE_SECONDS
