"""A profile of a live server: its link, its models' steps, and what a request costs beside them."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from computron.profiling.link import MeasuredLink, measure_link
from computron.profiling.server import CannotProfile, Details, Server
from computron.profiling.steps import MeasuredSteps, measure_steps
from computron.simulation.hardware import Hardware, Profile, SimulatedModel


@dataclass(frozen=True, slots=True)
class Measured:
    """`steps`: by model."""

    profile: Profile
    link: MeasuredLink
    steps: Mapping[str, MeasuredSteps]


async def measure(
    server: Server,
    *,
    models: Sequence[str] = (),
    seconds: float,
    pause: float,
    bodies: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Measured:
    """Measure these models, or all, each for about so many seconds, with so many seconds of rest before each call.

    `bodies`: of requests to custom models. `progress` is told in words what is measured now.
    The server must be idle but for this. Raises CannotProfile.
    """
    served = {model.id: model for model in await server.models()}
    for name in models:
        if name not in served:
            raise CannotProfile(f"{server.url} serves no model {name!r}; it has {', '.join(served)}")
    chosen = [served[name] for name in models or served]
    busy = [model.id for model in served.values() if model.queue_depth or model.running]
    if busy:
        raise CannotProfile(f"others are using {', '.join(busy)}: measure a server that nobody else uses")
    values = await server.metrics()
    frames, frame_bytes = (_device(server, values, name) for name in ("device_frames", "page_bytes"))
    steps = {}
    for model in chosen:
        progress(f"measuring the steps of {model.id}")
        steps[model.id] = await measure_steps(server, model, seconds, pause, (bodies or {}).get(model.id))
    progress("measuring the link")
    link = await measure_link(server, chosen)
    call_overhead = statistics.median(each.call_overhead for each in steps.values())
    between = [each.step_overhead for each in steps.values() if each.step_overhead is not None]
    hardware = Hardware(
        link.link,
        frame_bytes=frame_bytes,
        frames=frames,
        stages=_device(server, values, "pipeline_stages"),
        request_overhead=call_overhead / 2,  # the two ways cannot be told apart from outside
        answer_overhead=call_overhead / 2,
        step_overhead=statistics.median(between) if between else 0.0,
    )
    described = tuple(_described(model, steps[model.id], frame_bytes) for model in chosen)
    source = {
        "server": server.url,
        "version": await server.version(),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Measured(Profile(hardware, described, source), link, steps)


def _device(server: Server, values: Mapping[tuple[str, str], float], name: str) -> int:
    value = values.get((f"computron_{name}", ""))
    if not value:
        raise CannotProfile(f"{server.url} does not tell computron_{name} in its /metrics: is it a Computron server?")
    return int(value)


def _described(model: Details, measured: MeasuredSteps, frame_bytes: int) -> SimulatedModel:
    return SimulatedModel(
        model.id,
        bytes=min(model.bytes, model.pages * frame_bytes),  # a group's nodes share the bytes, not the pages
        step=measured.fitted.step,
        max_batch_size=model.max_batch_size,
        continuous=model.task == "generate",
        segments=model.segments,
        cache_bytes_per_token=model.cache_bytes_per_token,
        overlaps=model.overlaps,
    )
