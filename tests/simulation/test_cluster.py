"""Several groups behind a router, on one clock."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from computron.routing import ROUTERS
from computron.simulation.hardware import Hardware, Link, SimulatedModel, StepTime
from computron.simulation.log import Log
from computron.simulation.simulate import simulate
from computron.simulation.workload import Arrival, Workload

PAGE = 1_000
HARDWARE = Hardware(Link(bandwidth=10_000.0), frame_bytes=PAGE, frames=20)
MODELS = [SimulatedModel(f"m{number}", 10 * PAGE, StepTime(0.1), max_batch_size=1) for number in range(4)]


def workload(*arrivals: tuple[float, str]) -> Workload:
    return Workload("test", tuple(model.name for model in MODELS), tuple(Arrival(*arrival) for arrival in arrivals))


def busy(seed: int, requests: int = 300) -> Workload:
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, 12) for _ in range(requests))
    return workload(*((time, f"m{min(draw.randrange(4), draw.randrange(4))}") for time in times))


def run(arrivals: Workload, groups: int, router: str = "resident", system: str = "default", warm: bool = True) -> Log:
    return simulate(arrivals, HARDWARE, MODELS, system=system, groups=groups, router=router, warm=warm)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_every_request_is_answered_by_the_group_that_the_log_tells(router: str, groups: int) -> None:
    log = run(busy(0), groups, router)
    assert log.groups == groups
    assert set(log.group) <= set(range(groups))
    assert not any(map(math.isnan, log.finished))
    assert sum(step.requests for step in log.steps) == len(log.group)
    assert Counter(log.group) == Counter(step.group for step in log.steps)


def test_groups_compute_at_the_same_time() -> None:
    log = run(workload((0.0, "m0"), (0.0, "m1"), (0.0, "m2")), 3, "least-loaded", "all-resident")
    assert list(log.group) == [0, 1, 2]
    assert list(log.finished) == pytest.approx([0.1, 0.1, 0.1])


def test_where_all_models_are_resident_every_group_has_all() -> None:
    log = run(busy(1), 3, "least-loaded", "all-resident")
    assert not log.swaps
    assert set(log.group) == {0, 1, 2}


def test_warming_up_leaves_models_where_the_router_put_them() -> None:
    log = run(workload(*((float(number), f"m{number}") for number in range(4))), 2)
    assert Counter(log.group) == {0: 2, 1: 2}
    assert not log.swaps


def test_without_warming_up_the_first_requests_bring_the_models() -> None:
    log = run(workload(*((2.0 * number, f"m{number}") for number in range(4))), 2, warm=False)
    assert Counter(swap.group for swap in log.swaps) == {0: 2, 1: 2}


def test_a_model_that_left_is_brought_again_and_the_router_learns_of_both() -> None:
    arrivals = workload(*((2.0 * number, f"m{number % 4}") for number in range(12)))
    small = HARDWARE.with_frames(10)  # one model each
    log = simulate(arrivals, small, MODELS, groups=2)
    assert not any(map(math.isnan, log.finished))
    assert len(log.swaps) >= 6
    assert set(log.group) == {0, 1}


def test_residency_saves_swaps() -> None:
    swaps = {router: len(run(busy(2), 3, router).swaps) for router in ("resident", "least-loaded")}
    assert swaps["resident"] < swaps["least-loaded"] / 2


def test_one_group_does_as_without_a_router() -> None:
    alone, beside = run(busy(3), 1), run(busy(3), 1, "hash")
    assert alone.finished == beside.finished
    assert set(alone.group) == {0}


def test_the_same_requests_give_the_same_log() -> None:
    first, again = run(busy(4), 3), run(busy(4), 3)
    assert (first.group, first.finished, first.swaps) == (again.group, again.finished, again.swaps)


def test_an_unknown_router_and_no_group_are_refused() -> None:
    with pytest.raises(ValueError, match="no router 'random'; there are resident"):
        run(busy(0), 2, "random")
    with pytest.raises(ValueError, match="at least one group"):
        run(busy(0), 0)
