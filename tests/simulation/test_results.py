from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from computron.simulation.hardware import Hardware, Link
from computron.simulation.log import EvictionRow, Log, StepRow, SwapRow
from computron.simulation.results import Distribution, Target, latencies, summarise
from computron.simulation.workload import Arrival, Workload

MIB = 2**20
HARDWARE = Hardware(Link(1e9), frame_bytes=MIB, frames=10)


def workload(*arrivals: Arrival) -> Workload:
    return Workload("w", tuple(dict.fromkeys(a.model for a in arrivals)), arrivals)


def log_of(*requests: tuple[float, float, float, float], groups: int = 1, ended: float | None = None) -> Log:
    """Requests: arrived, started, first token, finished."""
    log = Log(len(requests), groups)
    for number, times in enumerate(requests):
        log.arrived[number], log.started[number], log.first_token[number], log.finished[number] = times
    log.ended = ended if ended is not None else max((times[3] for times in requests), default=0.0)
    return log


def step(started: float, ended: float, compute: float | None = None, *, group: int = 0, requests: int = 1) -> StepRow:
    return StepRow(group, "a", started, ended, ended - started if compute is None else compute, requests)


def swap(
    ordered: float, ended: float, busy: float | None = None, *, group: int = 0, frames: int = 1, complete: bool = True
) -> SwapRow:
    return SwapRow(group, "a", ordered, ended, ended - ordered if busy is None else busy, frames, 0, False, complete)


def hidden(swaps, steps, groups=1):
    log = log_of((0.0, 0.0, 1.0, 1.0), groups=groups)
    log.swaps, log.steps = list(swaps), list(steps)
    return summarise(log, workload(Arrival(0.0, "a")), HARDWARE).hidden_swap_share


def test_percentiles_are_those_of_numpy():
    values = np.sort(np.random.default_rng(0).exponential(size=237))
    found = Distribution.of(values)
    assert dataclasses.astuple(found) == pytest.approx(
        (values.mean(), *np.percentile(values, (50, 90, 95, 99)), values.max())
    )
    assert Distribution.of(values[:1]) == Distribution(*[values[0]] * 6)
    assert Distribution.of(values[:0]) is None


def test_latencies_count_from_the_client_overall_and_per_model():
    log = log_of((0.0, 0.5, 1.0, 2.0), (1.0, 1.0, 1.5, 5.0), (2.0, 2.5, 2.75, 3.0))
    found = summarise(log, workload(Arrival(0.0, "a"), Arrival(1.0, "b"), Arrival(2.0, "a")), HARDWARE)
    assert (found.requests, found.finished, found.span, found.throughput) == (3, 3, 5.0, 3 / 5)
    assert (found.latency.mean, found.latency.p50, found.latency.max) == (7 / 3, 2.0, 4.0)
    assert found.first_token.p50 == 0.75
    assert found.longest_wait == 0.5
    assert (found.models["a"].requests, found.models["a"].latency.mean, found.models["a"].latency.p50) == (2, 1.5, 1.5)
    assert (found.models["b"].latency.max, found.models["b"].first_token.max) == (4.0, 0.5)
    assert latencies(log).tolist() == [1.0, 2.0, 4.0]


def test_rejected_requests_miss_every_target_and_have_no_latency():
    nan = float("nan")
    log = log_of((0.0, 0.0, 1.0, 1.0), (0.0, nan, nan, nan), (0.0, 0.0, 3.0, 3.0), ended=3.0)
    log.rejected[1] = "queue_full"
    found = summarise(log, workload(*[Arrival(0.0, "a")] * 3), HARDWARE, targets=(0.5, 1.0, 3))
    assert found.attainment == {"0.5s": 0.0, "1s": 1 / 3, "3s": 2 / 3}
    assert found.rejected == {"queue_full": 1}
    assert (found.finished, found.models["a"].rejected, found.latency.max, found.longest_wait) == (2, 1, 3.0, 0.0)


def test_a_target_may_count_in_each_requests_own_execution_time():
    log = log_of((0.0, 0.0, 1.0, 4.0), (0.0, 0.0, 1.0, 4.5))
    both = workload(*[Arrival(0.0, "a", seconds=1.0)] * 2)
    assert summarise(log, both, HARDWARE, targets=[Target(2.0, 2.0)]).attainment == {"2x+2s": 0.5}
    with pytest.raises(ValueError, match="tells each request's `seconds`"):
        summarise(
            log, workload(Arrival(0.0, "a", seconds=1.0), Arrival(0.0, "a")), HARDWARE, targets=[Target(2.0, 2.0)]
        )


def test_a_target_may_be_for_the_first_token():
    nan = float("nan")
    log = log_of((0.0, 0.0, 1.0, 9.0), (0.0, 0.0, 2.0, 2.0), (0.0, 0.0, 1.0, nan), ended=9.0)
    found = summarise(log, workload(*[Arrival(0.0, "a")] * 3), HARDWARE, targets=[Target(1.0, first_token=True)])
    assert found.attainment == {"first=1s": 1 / 3}


def test_a_request_that_never_started_waits_until_the_end():
    nan = float("nan")
    found = summarise(log_of((1.0, nan, nan, nan), ended=9.0), workload(Arrival(1.0, "a")), HARDWARE)
    assert (found.longest_wait, found.finished, found.latency, found.fairness) == (8.0, 0, None, None)


@pytest.mark.parametrize(("b", "fairness"), [(1.0, 1.0), (3.0, 0.8)])
def test_fairness_is_jains_index_of_mean_latencies(b, fairness):
    log = log_of((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, b, b))
    assert summarise(log, workload(Arrival(0.0, "a"), Arrival(0.0, "b")), HARDWARE).fairness == pytest.approx(fairness)


def test_swaps_and_bytes_are_counted_overall_per_request_and_per_model():
    log = log_of((0.0, 0.0, 1.0, 2.0), (0.0, 0.0, 1.0, 2.0))
    log.swaps = [swap(0.0, 0.5, frames=2, complete=False), swap(0.5, 1.0), swap(1.0, 1.5, frames=0)]
    found = summarise(log, workload(Arrival(0.0, "a"), Arrival(0.0, "b")), HARDWARE)
    assert (found.swaps, found.bytes, found.swaps_per_request, found.bytes_per_request) == (1, 3 * MIB, 0.5, 1.5 * MIB)
    assert (found.models["a"].swaps, found.models["a"].bytes, found.models["b"].swaps) == (1, 3 * MIB, 0)


@pytest.mark.parametrize(
    ("swaps", "steps", "share"),
    [
        ([swap(0.0, 1.0)], [step(0.5, 2.0)], 0.5),
        ([swap(0.0, 1.0)], [step(1.0, 2.0)], 0.0),
        ([swap(0.0, 1.0)], [], 0.0),
        ([swap(0.0, 1.0, busy=0.5)], [step(0.0, 0.75)], 0.5),  # it had the link in its last half
        ([swap(0.0, 1.0)], [step(0.0, 2.0, compute=0.5)], 0.25),  # it waited for pages most of the time
        ([swap(0.0, 1.0)], [step(0.0, 0.5), step(0.0, 0.5)], 0.5),  # two stages at once
        ([swap(0.0, 1.0), swap(2.0, 5.0)], [step(0.0, 1.0)], 0.25),
        ([swap(0.0, 1.0)], [step(0.25, 0.25)], 0.0),
        ([], [step(0.0, 1.0)], None),
    ],
)
def test_a_swap_is_hidden_while_the_device_computes(swaps, steps, share):
    found = hidden(swaps, steps)
    assert found is None if share is None else found == pytest.approx(share)


def test_a_step_of_another_group_hides_nothing():
    assert hidden([swap(0.0, 1.0, group=1)], [step(0.0, 1.0, group=0)], groups=2) == 0.0


def test_utilisation_is_of_all_groups_and_stages():
    log = log_of((2.0, 2.0, 6.0, 6.0), groups=2)
    log.swaps = [swap(2.0, 4.0)]
    log.steps = [step(2.0, 6.0, compute=3.0, requests=2), step(3.0, 4.0, compute=1.0, group=1, requests=1)]
    log.evictions = [EvictionRow(0, "a", 2.0, 4, 1.0)]
    found = summarise(log, workload(Arrival(2.0, "a")), dataclasses.replace(HARDWARE, stages=2))
    assert (found.span, found.device_utilisation) == (4.0, 4 / 16)
    assert (found.link_utilisation, found.link_back_utilisation) == (2 / 8, 1 / 8)
    assert (found.steps, found.mean_batch) == (2, 1.5)


def test_an_empty_log_has_a_summary_and_any_summary_is_json():
    empty = summarise(Log(0), Workload("w", ("a",), ()), HARDWARE, targets=(1.0,))
    assert (empty.requests, empty.latency, empty.throughput, empty.attainment) == (0, None, 0.0, {"1s": 0.0})
    written = msgspec.json.decode(msgspec.json.encode(empty))
    assert written["models"]["a"]["requests"] == 0
    assert written["hidden_swap_share"] is None
