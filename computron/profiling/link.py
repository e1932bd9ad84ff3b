"""Times the link from the host to the device, by loads and unloads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from computron.profiling.fit import non_negative_least_squares
from computron.profiling.server import CannotProfile, Details, Server
from computron.simulation.hardware import Link

LOADS = 5  # of each model


@dataclass(frozen=True, slots=True)
class Load:
    """A model came to the device: the median of its loads. `swaps`: pieces in which it came, one after the other."""

    model: str
    nbytes: int
    seconds: float
    swaps: int = 1


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """`errors`: of each load's seconds as foretold by `link`, relative."""

    link: Link
    loads: tuple[Load, ...]
    errors: tuple[float, ...]


async def measure_link(server: Server, models: Sequence[Details]) -> MeasuredLink:
    """Take each model off the device and bring it back, some times. Raises CannotProfile."""
    movable = [model for model in models if model.bytes and not model.pinned]
    if not movable:
        raise CannotProfile(
            "the link cannot be measured: all models asked for are pinned, or have no weights to be loaded"
        )
    loads = [await _time_loads(server, model.id) for model in movable]
    link = fit_link(loads)
    errors = tuple((load.swaps * link.latency + load.nbytes / link.bandwidth) / load.seconds - 1.0 for load in loads)
    return MeasuredLink(link, tuple(loads), errors)


async def _time_loads(server: Server, model: str) -> Load:
    loads = []
    last = await server.counts(model)
    for _ in range(LOADS):
        await server.unload(model)
        before = await server.counts(model)
        await server.load(model)
        now = await server.counts(model)
        now.since(last).refuse_others(model)
        took, last = now.since(before), now
        if not took.step_requests and took.swaps and took.swap_bytes and took.swap_seconds:
            loads.append(Load(model, took.swap_bytes, took.swap_seconds, took.swaps))
    if not loads:
        raise CannotProfile(f"no load of {model} could be timed: measure a server that nobody else uses")
    return sorted(loads, key=lambda load: load.seconds)[len(loads) // 2]


def fit_link(loads: Sequence[Load]) -> Link:
    """Bandwidth and latency from loads whose pieces have several sizes; of one size, bandwidth alone."""
    sizes = [load.nbytes / load.swaps for load in loads]
    if max(sizes) < DISTINCT * min(sizes):
        return Link(statistics.median(load.nbytes / load.seconds for load in loads))
    rows = np.array([[load.nbytes / load.seconds, load.swaps / load.seconds] for load in loads])
    per_byte, latency = non_negative_least_squares(rows, np.ones(len(loads)))
    if per_byte <= 0.0:
        raise CannotProfile("loads take no longer for more bytes: the link cannot be measured")
    return Link(1.0 / float(per_byte), float(latency))


DISTINCT = 1.5  # sizes of pieces that differ by less say nothing of latency
