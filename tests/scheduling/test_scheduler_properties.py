"""Random lives of a device. Whatever happens, the driver's checks hold, and every request comes to an end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from driver import PAGE_SECONDS, Driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_device import spec

from computron.scheduling.events import LoadAsked, ModelSpec, UnloadAsked
from computron.scheduling.policies import POLICIES
from computron.scheduling.tuning import Tuning

MODERATE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TIMES = st.floats(0.0, 5.0).map(lambda time: round(time, 2))


@dataclass
class Scenario:
    frames: int
    models: list[ModelSpec]
    scheduler: dict[str, object]
    requests: list[dict[str, object]] = field(default_factory=list)
    cancels: list[tuple[int, float]] = field(default_factory=list)
    wishes: list[tuple[str, bool, float]] = field(default_factory=list)
    failing_swaps: set[int] = field(default_factory=set)
    failing_steps: set[int] = field(default_factory=set)

    def driver(self) -> Driver:
        driver = Driver(self.frames, self.models, **self.scheduler)
        driver.failing_swaps, driver.failing_steps = self.failing_swaps, self.failing_steps
        for number, request in enumerate(self.requests):
            driver.arrive(number, **request)
        for number, time in self.cancels:
            if number < len(self.requests):
                driver.cancel(number, max(time, self.requests[number]["time"]))
        for model, load, time in self.wishes:
            driver.at(time, LoadAsked(model) if load else UnloadAsked(model))
        return driver


@st.composite
def models(draw, number, *, caches):
    shared = draw(st.lists(st.integers(1, 8), max_size=4))
    private = draw(st.integers(0 if shared else 1, 5))
    pages = (*shared, *range(1000 * (number + 1), 1000 * (number + 1) + private))
    continuous = caches and draw(st.booleans())
    return ModelSpec(
        f"m{number}",
        pages,
        (len(pages),),
        max_batch_size=draw(st.integers(1, 4)),
        max_queue=draw(st.sampled_from([2, 100])),
        continuous=continuous,
        blocks_per_frame=draw(st.sampled_from([0.4, 1.0, 2.5])) if continuous else 0.0,
        pinned=number == 0 and caches and private + len(shared) < 4 and draw(st.booleans()),
    )


@st.composite
def scenarios(draw, *, caches=True, faults=True, deadlines=True):
    count = draw(st.integers(2, 5))
    specs = [draw(models(number, caches=caches)) for number in range(count)]
    request = st.fixed_dictionaries(
        {
            "model": st.sampled_from([spec.model for spec in specs]),
            "time": TIMES,
            "steps": st.integers(1, 12),
            "priority": st.integers(0, 2),
            "growth": st.integers(0, 1) if caches else st.just(0),
            "blocks": st.integers(0, 3) if caches else st.just(0),
            "deadline": st.none() | st.floats(0.1, 9.0) if deadlines else st.none(),
        }
    )
    numbers = st.sets(st.integers(0, 15), max_size=6) if faults else st.just(set())
    return Scenario(
        frames=draw(st.integers(4, 14)),
        models=specs,
        scheduler={
            "policy": draw(st.sampled_from(sorted(POLICIES))),
            "max_wait": draw(st.sampled_from([0.2, 1.0, 30.0])),
            "prefetch": draw(st.booleans()),
            "max_steps_in_flight": draw(st.sampled_from([1, 1, 2, 3])),
            "tells_stages": draw(st.booleans()),
            "tuning": Tuning(
                keep=draw(st.sampled_from([0.0, 1.0])),
                candidates=draw(st.sampled_from([2, 16])),
                piece=draw(st.sampled_from([PAGE_SECONDS, 2.5 * PAGE_SECONDS, math.inf])),
            ),
            "step_seconds": draw(st.sampled_from([0.02, 0.1, 0.5])),
        },
        requests=draw(st.lists(request, min_size=1, max_size=25)),
        cancels=draw(st.lists(st.tuples(st.integers(0, 24), TIMES), max_size=5)) if faults else [],
        wishes=draw(
            st.lists(st.tuples(st.sampled_from([spec.model for spec in specs]), st.booleans(), TIMES), max_size=3)
        )
        if faults
        else [],
        failing_swaps=draw(numbers),
        failing_steps=draw(numbers),
    )


@MODERATE
@given(scenarios())
def test_no_request_is_lost_and_no_frame_is_owned_twice(scenario):
    driver = scenario.driver()
    driver.drain()
    assert driver.outcomes.keys() == set(range(len(scenario.requests)))


@MODERATE
@given(scenarios(faults=False, deadlines=False))
def test_without_faults_everything_that_fits_is_answered(scenario):
    scenario.models = [ModelSpec(**{**_fields(spec), "max_queue": 1000}) for spec in scenario.models]
    driver = scenario.driver()
    driver.drain()
    assert set(driver.outcomes.values()) <= {"finished", "too_large"}


@MODERATE
@given(scenarios(caches=False, faults=False))
def test_nobody_waits_past_max_wait_while_others_are_served_after_it(scenario):
    max_wait = scenario.scheduler["max_wait"]
    scenario.scheduler["tuning"] = replace(scenario.scheduler["tuning"], keep=0.0)
    driver = scenario.driver()

    def limit(live):
        limit = live.waiting_since + max_wait
        if live.request.deadline is not None and live.started in (None, driver.now):
            limit = min(limit, live.request.deadline)
        return limit

    def on_run(model, requests):
        first_served = min(limit(driver.live[request]) for request in requests)
        link_is_busy = any(not transfer.cancelled for transfer in driver.device.transfers.values())
        for live in driver.live.values():
            other = live.request.model
            overdue = live.started is None and driver.now > live.request.arrival + max_wait + 1e-6
            waits_for_a_step = driver.steps.keys() - {model}  # of its own model, or one whose pages will be enough
            if overdue and other != model and not waits_for_a_step and not link_is_busy:
                assert first_served <= limit(live) + 1e-6, (
                    f"{model} runs at {driver.now} for requests with limit {first_served}, "
                    f"{live.request.id} of {other} should have been in a step at {limit(live)}"
                )

    driver.on_run = on_run
    driver.drain()


@st.composite
def saturated(draw):
    """A pipeline that one model of two pages has steps in nearly all the time, and seldom requests to others.

    The device has room for the largest model with its cache beside half of the busy one.
    """
    stages = draw(st.integers(2, 3))
    step = draw(st.sampled_from([0.1, 0.4]))
    others = [
        spec(f"m{number}", draw(st.integers(1, 4)), batch=1, **(GENERATES if draw(st.booleans()) else {}))
        for number in range(draw(st.integers(1, 3)))
    ]
    largest = max(len(other.pages) + (1 if other.continuous else 0) for other in others)
    scheduler = {
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "max_wait": draw(st.sampled_from([3.0, 10.0])),
        "prefetch": draw(st.booleans()),
        "max_steps_in_flight": stages,
        "tells_stages": draw(st.booleans()),
        "tuning": Tuning(piece=draw(st.sampled_from([PAGE_SECONDS, math.inf]))),
        "step_seconds": {"hot": step} | {other.model: 0.05 for other in others},
        "step_limit": 100_000,
    }
    gap = step / (stages if scheduler["tells_stages"] else 1) * draw(st.floats(1.05, 1.5))
    requests = [{"model": "hot", "time": gap * number} for number in range(int(40.0 / gap))]
    for time in draw(st.lists(st.integers(0, 300), min_size=1, max_size=8)):
        model = draw(st.sampled_from(others))
        requests.append({"model": model.model, "time": 0.1 * time, "blocks": 1 if model.continuous else 0})
    return Scenario(largest + draw(st.integers(1, 4)), [spec("hot", 2, batch=1), *others], scheduler, requests)


GENERATES = {"continuous": True, "blocks_per_frame": 1.0}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(saturated())
def test_model_that_never_pauses_keeps_nobody_waiting_for_longer_than_promised(scenario):
    driver = scenario.driver()
    driver.drain()
    steps = scenario.scheduler["step_seconds"]
    turns = sum(2.0 * len(model.pages) * PAGE_SECONDS + steps[model.model] for model in scenario.models)
    for number, request in enumerate(scenario.requests):
        if request["model"] != "hot":
            assert driver.outcomes[number] == "finished"
            same = sum(other["model"] == request["model"] for other in scenario.requests)
            assert driver.waits[number] <= scenario.scheduler["max_wait"] + 2 * turns + same * 0.05


def _fields(spec):
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}
