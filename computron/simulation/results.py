"""What came of a simulation, summed up. Times are seconds, sizes bytes of one node; all can be written as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from computron.simulation.busy import Busy, Spans
from computron.simulation.hardware import Hardware
from computron.simulation.log import Log
from computron.simulation.workload import Workload

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles are interpolated between neighbours."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @staticmethod
    def of(ordered: Floats) -> Distribution | None:
        """Of values in ascending order; None of no values."""
        if not len(ordered):
            return None
        p50, p90, p95, p99 = (_percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
        return Distribution(float(ordered.mean()), p50, p90, p95, p99, float(ordered[-1]))


@dataclass(frozen=True, slots=True)
class Target:
    """A request is in time if its latency is at most `seconds` + `multiple` x its own execution time.

    first_token: the time to its first token instead of its latency.
    """

    seconds: float
    multiple: float = 0.0
    first_token: bool = False

    def __str__(self) -> str:
        fixed = f"{self.seconds:g}s"
        text = f"{self.multiple:g}x+{fixed}" if self.multiple else fixed
        return f"first={text}" if self.first_token else text


@dataclass(frozen=True, slots=True)
class ModelSummary:
    requests: int
    finished: int
    rejected: int
    swaps: int
    bytes: int
    latency: Distribution | None
    first_token: Distribution | None


@dataclass(frozen=True, slots=True)
class Summary:
    """requests = finished + rejected, unless the simulation was cut off.

    span: seconds from the first arrival until nothing was left to do. What is a rate or a utilisation is of this time.
    throughput: finished requests a second.
    latency, first_token: from the client's sending to its having the answer, or its first token; of finished requests.
    attainment: by target, the share of all requests that were in time; a rejected request was not.
    longest_wait: from a request's arrival at the client to the beginning of its first step, or until its end if it
    never started; of requests that were not rejected.
    fairness: Jain's index over the models' mean latencies, (sum x)^2 / (n sum x^2): 1.0 if all models wait alike, 1/n
    if one waits for all others. Models of unequal execution times are not alike in a perfect system either, so that
    it compares systems on one workload, not workloads.
    swaps: swap-ins, in however many pieces; not counted is what brought nothing, or was given up. bytes: that came to
    one node. *_per_request: per finished one.
    hidden_swap_share: of the time that transfers had the link, the share during which the device computed, for
    whichever model. A transfer is taken to have had the link just before its end, a step to compute evenly.
    device_utilisation: seconds of compute over stages x groups x span. link_utilisation: seconds of transfers over
    groups x span; link_back_utilisation: of the other direction, which only systems that write weights back use.
    mean_batch: requests of a step.
    """

    requests: int
    finished: int
    rejected: dict[str, int]
    span: float
    throughput: float
    latency: Distribution | None
    first_token: Distribution | None
    attainment: dict[str, float]
    longest_wait: float
    fairness: float | None
    swaps: int
    swaps_per_request: float
    bytes: int
    bytes_per_request: float
    hidden_swap_share: float | None
    device_utilisation: float
    link_utilisation: float
    link_back_utilisation: float
    steps: int
    mean_batch: float
    models: dict[str, ModelSummary]


def latencies(log: Log) -> Floats:
    """Of finished requests, ascending."""
    finished = np.asarray(log.finished)
    taken = finished - np.asarray(log.arrived)
    ordered: Floats = np.sort(taken[~np.isnan(taken)])
    return ordered


def summarise(log: Log, workload: Workload, hardware: Hardware, *, targets: Sequence[float | Target] = ()) -> Summary:
    """Raises ValueError if a target counts in execution times and the workload does not tell them."""
    arrived, finished = np.asarray(log.arrived), np.asarray(log.finished)
    ended = ~np.isnan(finished)
    latency = finished - arrived
    first_token = np.asarray(log.first_token) - arrived
    rejected = _flags(log.rejected, len(arrived))
    done = int(ended.sum())
    span = max(log.ended - (workload.arrivals[0].time if workload.arrivals else 0.0), 0.0)

    swaps = Spans(log.swaps, begin=lambda row: row.ended - row.busy)
    steps = Spans(log.steps, begin=attrgetter("started"))
    compute = _column(log.steps, "compute")
    frames = _column(log.swaps, "frames")
    moved = int(frames.sum()) * hardware.frame_bytes
    link = float(_column(log.swaps, "busy").sum())
    models = _by_model(log, workload, hardware, latency, first_token, ended, rejected)
    return Summary(
        requests=len(arrived),
        finished=done,
        rejected=dict(Counter(log.rejected.values()).most_common()),
        span=span,
        throughput=_share(done, span),
        latency=Distribution.of(np.sort(latency[ended])),
        first_token=Distribution.of(np.sort(first_token[ended])),
        attainment=_attainment(workload, latency, first_token, targets),
        longest_wait=_longest_wait(log, arrived, rejected),
        fairness=_fairness([model.latency.mean for model in models.values() if model.latency is not None]),
        swaps=int(_whole(log).sum()),
        swaps_per_request=_share(int(_whole(log).sum()), done),
        bytes=moved,
        bytes_per_request=_share(moved, done),
        hidden_swap_share=_share(Busy(steps, compute).within(swaps), link) if link else None,
        device_utilisation=_share(float(compute.sum()), span * log.groups * hardware.stages),
        link_utilisation=_share(link, span * log.groups),
        link_back_utilisation=_share(float(_column(log.evictions, "written").sum()), span * log.groups),
        steps=len(log.steps),
        mean_batch=_share(float(_column(log.steps, "requests").sum()), len(log.steps)),
        models=models,
    )


def _whole(log: Log) -> Flags:
    """Which transfers ended a swap-in."""
    return np.fromiter((row.complete and row.frames > 0 for row in log.swaps), np.bool_, len(log.swaps))


def _by_model(
    log: Log,
    workload: Workload,
    hardware: Hardware,
    latency: Floats,
    first_token: Floats,
    ended: Flags,
    rejected: Flags,
) -> dict[str, ModelSummary]:
    """In the order of the workload's models."""
    places = {model: place for place, model in enumerate(workload.models)}
    which = np.fromiter((places[a.model] for a in workload.arrivals), np.int64, len(workload.arrivals))
    count = len(places)
    swapped = np.fromiter((places.get(row.model, count) for row in log.swaps), np.int64, len(log.swaps))
    frames = _column(log.swaps, "frames")
    requests, finished, refused = (
        np.bincount(chosen, minlength=count) for chosen in (which, which[ended], which[rejected])
    )
    swaps = np.bincount(swapped[_whole(log)], minlength=count + 1)
    moved = np.bincount(swapped, weights=frames, minlength=count + 1) * hardware.frame_bytes
    bounds = np.concatenate(([0], np.cumsum(finished)))
    by_latency, by_first = (_sorted_within(which[ended], values[ended]) for values in (latency, first_token))
    return {
        model: ModelSummary(
            requests=int(requests[place]),
            finished=int(finished[place]),
            rejected=int(refused[place]),
            swaps=int(swaps[place]),
            bytes=int(moved[place]),
            latency=Distribution.of(by_latency[bounds[place] : bounds[place + 1]]),
            first_token=Distribution.of(by_first[bounds[place] : bounds[place + 1]]),
        )
        for model, place in places.items()
    }


def _attainment(
    workload: Workload, latency: Floats, first_token: Floats, targets: Sequence[float | Target]
) -> dict[str, float]:
    wanted = [target if isinstance(target, Target) else Target(target) for target in targets]
    own: Floats = np.zeros(len(latency))
    if any(target.multiple for target in wanted):
        if any(arrival.seconds is None for arrival in workload.arrivals):
            raise ValueError("a target in execution times needs a workload that tells each request's `seconds`")
        own = np.fromiter((arrival.seconds or 0.0 for arrival in workload.arrivals), np.float64, len(latency))
    shares = {}
    for target in wanted:
        taken = np.where(np.isnan(latency), np.nan, first_token) if target.first_token else latency
        in_time = taken <= target.seconds + target.multiple * own  # never true of a time that is not there (NaN)
        shares[str(target)] = _share(int(in_time.sum()), len(latency))
    return shares


def _longest_wait(log: Log, arrived: Floats, rejected: Flags) -> float:
    started = np.asarray(log.started)
    waits = np.where(np.isnan(started), log.ended, started) - arrived
    counted = waits[~rejected & ~np.isnan(waits)]
    return float(counted.max()) if len(counted) else 0.0


def _fairness(values: Sequence[float]) -> float | None:
    squares = len(values) * math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / squares if squares else None


def _percentile(ordered: Floats, share: float) -> float:
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def _sorted_within(groups: NDArray[np.int64], values: Floats) -> Floats:
    """The values of group 0 in ascending order, then those of group 1, ..."""
    ordered: Floats = values[np.lexsort((values, groups))]
    return ordered


def _flags(numbers: Iterable[int], count: int) -> Flags:
    flags = np.zeros(count, dtype=bool)
    flags[list(numbers)] = True
    return flags


def _column(rows: Sequence[Any], name: str) -> Floats:
    return np.fromiter(map(attrgetter(name), rows), np.float64, len(rows))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
