"""How long a step waits on an aggregator that several jobs share: a prediction, checked by simulation.

Each job commits a burst of work once an iteration. The aggregator does the latest one first and looks for a later one
after each chunk. Lateness is the time since the deadline (commit + its work + what the job may lose, its allowance), as
a share of the allowance. So a burst lets another one end of which less is left than its own work is; for one of which
more is left it waits only if its job can wait less, until it has become as late. Two jobs meet in one of two ways.

Drifting. Their phases change all the time, so that a commit finds the other's burst at a random point, as a Poisson
arrival would. It waits for what is left of a burst that goes first, e^2 / 2D in the mean if all of it does (the
residual work of M/G/1, Kleinrock, Queueing Systems I, 5.2, and with priorities II, 3.3), and for shorter bursts that
come before less than these is left of its own. What is left to wait for is divided by the share of time that the other
jobs leave.

In step. After k = floor(D_slow / D_fast) of its own iterations the fast job commits before the slow job's burst is
over, waits for it, and so goes on right behind it: it loses the difference of D_slow and k D_fast, as in cyclic
execution, again and again. The slow job loses nothing by it, unless its burst is so long that the fast job commits
within it more than once. Jobs of equal periods lose nothing at all. It happens where that difference is shorter than
what the fast job may have to wait for. Then the larger of both waits is taken, but not where the difference is no more
than the jitter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RUN_ERROR = 1e-9  # so much less than a whole run still is one: periods are sums of floats


@dataclass(frozen=True, slots=True)
class Burst:
    """Seconds. period: of an iteration without waiting. cpu: work in it. allowance: what the job may lose in it."""

    period: float
    cpu: float
    allowance: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Mean seconds a step. drifting: behind jobs that come by chance. in_step: behind one it has fallen in with."""

    drifting: float
    in_step: float


def wait_of(place: int, bursts: Sequence[Burst], chunk: float, jitter: float) -> Wait:
    """Of one job on an aggregator with these bursts. Seconds; jitter is a share of the period.

    The wait is without end (inf) for a job to which the others leave no time.
    """
    if len(bursts) == 1:
        return Wait(0.0, 0.0)
    own = bursts[place]
    period, cpu = own.period, own.cpu
    residual = in_step = overtaken = 0.0
    left = 1.0 + cpu / period - sum(burst.cpu / burst.period for burst in bursts)
    if left <= 0.0:
        return Wait(math.inf, 0.0)
    for other_place, other in enumerate(bursts):
        if other_place == place:
            continue
        share = other.cpu / other.period
        met = _behind(own, other) / other.period + chunk * share / 2.0
        if (other.period, other_place) > (period, place):
            lag = _lag(own, other)
            if lag is not None:
                in_step = max(in_step, lag + jitter * period, met if lag > jitter * period else 0.0)
                continue
        elif _lag(other, own) is not None:
            in_step = max(in_step, jitter * period)
            if cpu / left < other.period:
                continue
            met = 0.0
        residual += met
        if cpu > other.cpu:
            overtaken += share * (1.0 - other.cpu / cpu)
    if overtaken >= 1.0:
        return Wait(math.inf, in_step)
    return Wait((residual / left + cpu * overtaken) / (1.0 - overtaken), in_step)


def _behind(own: Burst, other: Burst) -> float:
    """Integral of the wait over what may be left of the other burst when this one is committed, seconds squared.

    It waits for all of that if that is less than its own work; of more, if it can wait less than the other, until it
    has become as late. A burst that can wait longer is the later one at once, and stays so.
    """
    whole = min(own.cpu, other.cpu)
    waited = whole * whole / 2.0
    if own.allowance < other.allowance and own.allowance > 0.0:
        ratio = own.allowance / other.allowance
        end = min(other.cpu, own.cpu / ratio)
        if end > own.cpu:
            mean = own.cpu - ratio * (own.cpu + end) / 2.0
            waited += (end - own.cpu) * mean / (1.0 - ratio)
    return waited


def _lag(fast: Burst, slow: Burst) -> float | None:
    """Seconds that each of the fast job's steps waits for the slow one's if they are in step; None if they are not."""
    runs = int(slow.period / fast.period + RUN_ERROR)
    behind = max(0.0, slow.period - runs * fast.period)
    return behind / runs if behind < min(slow.cpu, fast.cpu) else None
