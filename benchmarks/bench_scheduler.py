"""What does the scheduler cost for each event, and does that grow with models that nobody asks for, or with pages?

The scheduler that serves, on a virtual clock: requests come as a Poisson process, their models by Zipf's law, as many a
second as keep the link busy for 70 % of the time if the most popular models stay on the device. A driver, which is not
counted, moves the clock, ends transfers and steps, and obeys. Each call of `Scheduler.handle` is timed by itself, with
the CPU clock of the thread, so that what else runs on the machine counts as little as can be; reading that clock (under
half a microsecond) is in the figures. Garbage is collected as ever, but what stands when the requests begin is frozen,
as it is in a server.

`scheduler.us_per_event` is the mean over all requests of the large run; p50, p99 and the maximum stand beside it, and
how many requests a second the scheduler alone could decide.
`scheduler.idle_*`: the same requests to the same models beside so many models that were asked for once, long before;
`baseline` has 100 of them. `scheduler.pages_*`: the same requests with so many pages a model; `baseline` has 16.
Nothing is emulated; `--device` changes nothing.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from array import array
from dataclasses import dataclass, replace

import numpy as np
from _common import Report, arguments

from computron.scheduling.actions import Action, CancelSwap, RaiseUrgency, Reject, Run, SwapIn, Urgency, WakeAt
from computron.scheduling.events import (
    Event,
    ModelAdded,
    ModelSpec,
    Request,
    RequestArrived,
    StepFinished,
    SwapCancelled,
    SwapFinished,
    TimePassed,
)
from computron.scheduling.scheduler import Scheduler

IDLE = (100, 1_000, 10_000)
PAGES = (16, 160, 1_600)
NAMES = (
    *(f"scheduler.{name}" for name in ("us_per_event", "p50_us", "p99_us", "max_us", "requests_per_second")),
    *(f"scheduler.idle_{count}.us_per_event" for count in IDLE),
    *(f"scheduler.pages_{count}.us_per_event" for count in PAGES),
)
PAGE_BYTES = 16 << 20
BANDWIDTH = 25e9
STEP_SECONDS = 0.005
BATCH = 8


@dataclass(frozen=True, slots=True)
class Load:
    """`models` share the requests by Zipf's law; `idle` others were asked for once. The device has room for `room`."""

    models: int
    requests: int
    pages: int = 96
    room: int = 300
    idle: int = 0
    link_load: float = 0.7

    @property
    def swap_seconds(self) -> float:
        return self.pages * PAGE_BYTES / BANDWIDTH

    def arrivals(self, seed: int) -> tuple[list[float], list[int]]:
        """Times and models of all requests."""
        random = np.random.default_rng(seed)
        popularity = 1.0 / np.arange(1, self.models + 1)
        popularity /= popularity.sum()
        rate = self.link_load / (popularity[self.room :].sum() * self.swap_seconds)
        times = random.exponential(1.0 / rate, self.requests).cumsum()
        return times.tolist(), random.choice(self.models, self.requests, p=popularity).tolist()


@dataclass(slots=True)
class Transfer:
    pages: tuple[int, ...]
    urgency: Urgency
    ordered: float
    left: float
    cancelled: bool = False
    came: int = 0  # pages, until it was cancelled

    @property
    def order(self) -> tuple[bool, int, float]:
        return (not self.cancelled, self.urgency, self.ordered)


class Driver:
    """Obeys the scheduler on a virtual clock: one link, the most urgent transfer first, and one step at a time."""

    def __init__(self, load: Load) -> None:
        self.now = 0.0
        self.seconds = array("d")  # of each call of `handle`
        self._scheduler = Scheduler(
            frames=load.room * load.pages, frame_bytes=PAGE_BYTES, link_bandwidth_hint=BANDWIDTH, max_wait=30.0
        )
        self._page_seconds = load.swap_seconds / load.pages
        self._transfers: dict[str, Transfer] = {}
        self._moved_until = 0.0
        self._step: Run | None = None
        self._step_end = math.inf  # also while it waits for its pages
        self._wake = math.inf
        self._numbers = itertools.count()
        self.unanswered = 0
        for number in range(load.models + load.idle):
            pages = tuple(range(number * load.pages, (number + 1) * load.pages))
            self._tell(ModelAdded(ModelSpec(f"m{number}", pages, (load.pages,), max_batch_size=BATCH)))

    def arrive(self, model: int, at: float) -> None:
        """A request comes at this time; what happens before it comes first."""
        self._run_until(at)
        self._tell(RequestArrived(Request(next(self._numbers), f"m{model}", at)))
        self.unanswered += 1

    def drain(self) -> None:
        while self.unanswered:
            self._run_until(self._next()[0])

    def _tell(self, event: Event) -> None:
        handle, now = self._scheduler.handle, self.now
        began = time.thread_time()
        actions = handle(event, now)
        self.seconds.append(time.thread_time() - began)
        for action in actions:
            self._perform(action)

    def _on_link(self) -> str | None:
        waiting = self._transfers
        return min(waiting, key=lambda name: waiting[name].order) if waiting else None

    def _next(self) -> tuple[float, str | None]:
        """When something happens next, and whose transfer ends then."""
        time, transfer = min(self._step_end, self._wake), None
        name = self._on_link()
        if name is not None:
            end = self._moved_until + self._transfers[name].left
            if end <= time:
                time, transfer = end, name
        return time, transfer

    def _run_until(self, until: float) -> None:
        while (following := self._next())[0] <= until:
            self._move(following[0])
            if following[1] is not None:
                self._end_transfer(following[1])
            elif self._step_end <= self._wake:
                self._end_step()
            else:
                self._wake = math.inf
                self._tell(TimePassed())
        self._move(until)

    def _move(self, until: float) -> None:
        name = self._on_link()
        if name is not None:
            self._transfers[name].left = max(0.0, self._transfers[name].left - (until - self._moved_until))
        self._moved_until = self.now = until

    def _end_transfer(self, name: str) -> None:
        transfer = self._transfers.pop(name)
        if self._step is not None and self._step.model == name:
            self._step_end = self.now + STEP_SECONDS
        if transfer.cancelled:
            self._tell(SwapCancelled(name, transfer.pages, transfer.pages[: transfer.came]))
        else:
            self._tell(SwapFinished(name, transfer.pages, self.now - transfer.ordered))

    def _end_step(self) -> None:
        step = self._step
        assert step is not None
        self._step, self._step_end = None, math.inf
        self.unanswered -= len(step.requests)
        self._tell(StepFinished(step.model, step.requests, STEP_SECONDS))

    def _perform(self, action: Action) -> None:
        match action:
            case SwapIn(model, pages, urgency):
                self._transfers[model] = Transfer(pages, urgency, self.now, len(pages) * self._page_seconds)
            case RaiseUrgency(model, urgency):
                self._transfers[model].urgency = urgency
            case CancelSwap(model):
                transfer = self._transfers[model]
                transfer.came = int(len(transfer.pages) - math.ceil(transfer.left / self._page_seconds))
                transfer.cancelled, transfer.left = True, 0.0
            case Run(model, _):
                self._step = action
                self._step_end = math.inf if model in self._transfers else self.now + STEP_SECONDS
            case Reject():
                self.unanswered -= 1
            case WakeAt(time):
                self._wake = time


def measure(load: Load, seed: int) -> tuple[array[float], int]:
    """Seconds of each event, and of how many requests."""
    driver = Driver(load)
    for number in range(load.idle):
        driver.arrive(load.models + number, driver.now + load.swap_seconds)
    driver.drain()
    times, models = load.arrivals(seed)
    began = driver.now
    gc.collect()
    gc.freeze()
    driver.seconds = array("d")
    for at, model in zip(times, models, strict=True):
        driver.arrive(model, began + at)
    driver.drain()
    gc.unfreeze()
    return driver.seconds, load.requests


def mean_us(load: Load, seed: int) -> float:
    return statistics.fmean(measure(load, seed)[0]) * 1e6


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("Cost of the scheduler", options, NAMES)
    large = Load(1_000, 50_000) if options.quick else Load(10_000, 1_000_000)
    seconds, requests = measure(large, options.seed)
    report.row("scheduler.us_per_event", statistics.fmean(seconds) * 1e6, "us")
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        report.row(f"scheduler.{name}_us", float(np.quantile(seconds, share)) * 1e6, "us")
    report.row("scheduler.requests_per_second", requests / sum(seconds), "1/s")
    active = Load(500, 10_000 if options.quick else 100_000, room=100)
    for kind, loads in (
        ("idle", {count: replace(active, idle=count) for count in IDLE}),
        ("pages", {count: replace(active, pages=count) for count in PAGES}),
    ):
        baseline = None
        for count, load in loads.items():
            mean = mean_us(load, options.seed)
            baseline = baseline or mean
            report.row(f"scheduler.{kind}_{count}.us_per_event", mean, "us", baseline, mean / baseline)
    report.finish()


if __name__ == "__main__":
    main()
