"""Aggregators on a virtual clock: what sharing does to iterations when nothing goes as a formula assumes.

A job computes, commits, and computes again when all of its aggregators have applied the step. An aggregator has one
compute thread. It works on the step of which least is left, but first on those past their deadlines (commit + work here
+ allowance of the job), the latest one as a share of its allowance, and looks for a more urgent one after each chunk;
between chunks, switching is free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from computron.parameter_service.packing.loads import LEAST_ALLOWANCE

WARM_UP = 0.25  # share of the time that is not counted: jobs fall into step with each other in it


@dataclass(frozen=True, slots=True)
class SimulatedJob:
    """compute: seconds between the end of a step and the commit of the next. work: seconds of compute thread for one
    step, by aggregator. allowance: seconds by which a step may end late; more is over its deadline.
    """

    name: str
    compute: float
    work: Mapping[str, float]
    allowance: float


@dataclass(frozen=True, slots=True)
class Iterations:
    """Of one job, after warming up. mean, longest: seconds from the end of a step to the end of the next."""

    count: int
    mean: float
    longest: float


@dataclass(slots=True)
class _Step:
    job: int
    deadline: float
    allowance: float
    remaining: float

    def lateness(self, now: float) -> float:
        return max(0.0, (now - self.deadline) / self.allowance)

    def passes(self, other: _Step, left: float, now: float) -> float:
        """From when on it is more urgent than the other one, of which so much is left and which goes on; infinite if
        never.
        """
        mine, theirs = self.lateness(now), other.lateness(now)
        if mine > theirs or (mine == theirs and self.remaining < left):
            return now
        late = max(now, self.deadline)
        if late < other.deadline:
            return late
        if self.allowance >= other.allowance:
            return math.inf
        crossing = self.deadline * other.allowance - other.deadline * self.allowance
        return max(late, crossing / (other.allowance - self.allowance))


@dataclass(slots=True)
class _Server:
    """`began`: when the current stretch of work on `current` began. `turn`: counts stretches; older ends are void."""

    waiting: list[_Step] = field(default_factory=list)
    current: _Step | None = None
    began: float = 0.0
    until: float = 0.0
    turn: int = 0


class _Run:
    def __init__(self, jobs: Sequence[SimulatedJob], chunk: float, jitter: float, seed: int) -> None:
        self.jobs = jobs
        self.chunk = chunk
        self.jitter = jitter
        self.random = np.random.default_rng(seed)
        names = sorted({server for job in jobs for server in job.work})
        self.servers = [_Server() for _ in names]
        places = {name: place for place, name in enumerate(names)}
        self.work = [[(places[name], seconds) for name, seconds in sorted(job.work.items())] for job in jobs]
        self.events: list[tuple[float, int, int, int]] = []  # time, kind or server, job or turn, order of making
        self.open = [0] * len(jobs)
        self.ends: list[list[float]] = [[] for _ in jobs]
        self.made = 0

    def run(self, seconds: float) -> None:
        for number, job in enumerate(self.jobs):
            self._commit_at(float(self.random.uniform(0.0, job.compute + sum(job.work.values()))), number)
        while self.events:
            now, server, subject, _ = heapq.heappop(self.events)
            if now > seconds:
                return
            if server < 0:
                self._commit(subject, now)
            else:
                self._stretch_ended(server, subject, now)

    def _commit_at(self, time: float, job: int) -> None:
        self._event(time, -1, job)

    def _event(self, time: float, server: int, subject: int) -> None:
        self.made += 1
        heapq.heappush(self.events, (time, server, subject, self.made))

    def _commit(self, job: int, now: float) -> None:
        allowance = max(LEAST_ALLOWANCE, self.jobs[job].allowance)
        self.open[job] = len(self.work[job])
        for place, seconds in self.work[job]:
            server = self.servers[place]
            step = _Step(job, now + seconds + allowance, allowance, seconds)
            server.waiting.append(step)
            if server.current is None:
                self._begin(place, now)
            else:
                self._stop_at(place, self._boundary(server, step, now))

    def _boundary(self, server: _Server, step: _Step, now: float) -> float:
        """Of the chunk after which this one, which waits, goes first."""
        assert server.current is not None
        left = server.current.remaining - (now - server.began)
        passes = step.passes(server.current, left, now)
        if math.isinf(passes):
            return math.inf
        return server.began + math.ceil((passes - server.began) / self.chunk) * self.chunk

    def _stop_at(self, place: int, time: float) -> None:
        server = self.servers[place]
        if time < server.until:
            server.until = time
            server.turn += 1
            self._event(time, place, server.turn)

    def _begin(self, place: int, now: float) -> None:
        server = self.servers[place]
        server.current = max(server.waiting, key=lambda step: (step.lateness(now), -step.remaining, -step.job))
        server.waiting.remove(server.current)
        server.began = now
        server.until = math.inf
        self._stop_at(place, now + server.current.remaining)
        for step in server.waiting:
            boundary = self._boundary(server, step, now)
            self._stop_at(place, max(boundary, now + self.chunk))

    def _stretch_ended(self, place: int, turn: int, now: float) -> None:
        server = self.servers[place]
        if turn != server.turn or server.current is None:
            return
        step = server.current
        end = server.began + step.remaining
        server.current = None
        if now < end:
            step.remaining = end - now
            server.waiting.append(step)
        else:
            self._applied(step.job, now)
        if server.waiting:
            self._begin(place, now)

    def _applied(self, job: int, now: float) -> None:
        self.open[job] -= 1
        if self.open[job]:
            return
        self.ends[job].append(now)
        stretch = 1.0 + self.jitter * float(self.random.standard_normal()) if self.jitter else 1.0
        self._commit_at(now + self.jobs[job].compute * max(0.0, stretch), job)


def simulate(
    jobs: Sequence[SimulatedJob], *, seconds: float, chunk: float, jitter: float = 0.0, seed: int = 0
) -> dict[str, Iterations]:
    """All jobs at once for so many seconds, from phases drawn by `seed`.

    chunk: seconds after which an aggregator looks for more urgent work. jitter: standard deviation of a job's compute
    time as a share of it. Raises ValueError if a job ended fewer than two steps after the warm-up.
    """
    run = _Run(jobs, chunk, jitter, seed)
    run.run(seconds)
    result = {}
    for job, ends in zip(jobs, run.ends, strict=True):
        counted = np.array([end for end in ends if end >= WARM_UP * seconds])
        if len(counted) < 2:
            raise ValueError(f"{job.name} ended {len(counted)} steps in {seconds:g} s: simulate for longer")
        times = np.diff(counted)
        result[job.name] = Iterations(len(times), float(times.mean()), float(times.max()))
    return result
