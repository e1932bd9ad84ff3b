"""What `computron simulate` was asked for, as hardware, models and a workload. ValueError: it was asked wrongly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from computron._toml import Bandwidth, Duration, Size, convert, suggestion
from computron.cli.simulation.defaults import (
    BANDWIDTH,
    BATCH,
    CV,
    DURATION,
    FRAME,
    MAX_WAIT,
    MEMORY,
    MODEL_SIZE,
    MODELS,
    RATE,
    STEP_TIME,
    ZIPF,
)
from computron.routing import ROUTERS
from computron.simulation.arrivals import Constant, Empirical, Lengths, LogNormal, Settings, generate, zipf
from computron.simulation.experiment import Experiment
from computron.simulation.hardware import Hardware, Link, Profile, SimulatedModel, StepTime
from computron.simulation.report.table import size
from computron.simulation.results import Target
from computron.simulation.systems import SYSTEMS
from computron.simulation.traces import overlay, read_azure, read_csv, read_gentd26, read_lengths, speed_up
from computron.simulation.workload import Workload

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class HardwareOptions:
    """As typed; None: not given."""

    profile: Path | None = None
    models: int | None = None
    model_size: str | None = None
    memory: str | None = None
    bandwidth: str | None = None
    frame: str | None = None
    step_time: str | None = None
    prompt_token_time: str | None = None
    request_time: str | None = None
    cache_per_token: str | None = None
    batch: int | None = None


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """As typed; None: not given."""

    rate: float | None = None
    cv: float | None = None
    zipf: float | None = None
    duration: str | None = None
    seed: int = 0
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    trace: Path | None = None
    trace_format: str | None = None
    speed_up: float | None = None
    overlay: int | None = None


@dataclass(frozen=True, slots=True)
class SystemOptions:
    systems: tuple[str, ...] = ("default",)
    groups: int = 1
    router: str = "resident"
    max_wait: str = MAX_WAIT
    cold: bool = False
    sweep_load: str | None = None
    sweep_groups: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """notes: what whoever asked may not have meant, a line each."""

    experiment: Experiment
    systems: tuple[str, ...]
    loads: tuple[float, ...]
    group_counts: tuple[int, ...]
    notes: tuple[str, ...] = ()


def experiment(
    hardware: HardwareOptions, workload: WorkloadOptions, system: SystemOptions, slo: Sequence[str]
) -> Asked:
    """Raises ValueError with the option and the remedy, or OSError."""
    for name in system.systems:
        _choose("--policy", name, SYSTEMS)
    _choose("--router", system.router, ROUTERS)
    loads = _listed("--sweep-load", system.sweep_load, float, "numbers above 0; write it like 0.5,1,2")
    counts = _listed("--sweep-groups", system.sweep_groups, int, "whole numbers above 0; write it like 1,2,4")
    targets = _targets(slo)
    max_wait = _quantity("--max-wait", system.max_wait, Duration)
    requests, device, models = fleet(hardware, workload)
    _check_room(system.systems, device, models)
    if any(target.multiple for target in targets) and any(arrival.seconds is None for arrival in requests.arrivals):
        raise ValueError("--slo: this workload does not tell execution times, which a trace's `seconds` do")
    return Asked(
        Experiment(requests, device, models, targets, system.groups, system.router, max_wait, not system.cold),
        tuple(dict.fromkeys(system.systems)),
        loads,
        counts,
        _notes(hardware, models),
    )


def fleet(
    hardware: HardwareOptions, workload: WorkloadOptions
) -> tuple[Workload, Hardware, tuple[SimulatedModel, ...]]:
    """Raises ValueError or OSError."""
    if hardware.profile is None:
        device, shapes = _synthetic(hardware)
    else:
        device, shapes = _measured(hardware.profile, hardware)
    if workload.zipf is not None and not workload.zipf >= 0:
        raise ValueError(f"--zipf must be at least 0, not {workload.zipf:g}")
    names = _names(hardware.models, shapes, measured=hardware.profile is not None)
    requests = _synthetic_workload(workload, names) if workload.trace is None else _traced(workload, hardware, names)
    generates = any(arrival.output_tokens > 1 for arrival in requests.arrivals)
    models = _models(requests.models, shapes)
    if hardware.profile is None:
        models = tuple(replace(model, continuous=generates) for model in models)
    return requests, device, models


def _check_room(systems: Sequence[str], device: Hardware, models: Sequence[SimulatedModel]) -> None:
    for system in systems:
        room = SYSTEMS[system].hardware(device, models)
        for model in models:
            if model.pages(room.frame_bytes) > room.frames:
                raise ValueError(
                    f"model {model.name} takes {size(model.bytes)} of a device with "
                    f"{size(room.frames * room.frame_bytes)}: raise --memory"
                )


def _notes(hardware: HardwareOptions, models: Sequence[SimulatedModel]) -> tuple[str, ...]:
    """What costs nothing where models generate, because nobody said what it costs."""
    if hardware.profile is not None or not any(model.continuous for model in models):
        return ()
    free = {
        "KV caches take no memory: give --cache-per-token": hardware.cache_per_token,
        "prompts cost nothing: give --prompt-token-time": hardware.prompt_token_time,
        "a step takes as long for many requests as for one: give --request-time": hardware.request_time,
    }
    missing = [words for words, given in free.items() if given is None]
    return ("; ".join(missing),) if missing else ()


def _targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """Each "2s"; "2x+2s": twice the request's own execution time and two seconds; "first=1s": of the first token."""
    found = []
    for text in texts:
        match = re.fullmatch(r"(first=)?(?:(\d+(?:\.\d+)?)x\+)?(.*)", text)
        assert match is not None
        first, multiple, seconds = match.groups()
        try:
            limit = _quantity("--slo", seconds, Duration)
        except ValueError as error:
            raise ValueError(f"{error}; targets are like 2s, first=1s and 2x+2s") from error
        found.append(Target(limit, float(multiple or 0), first is not None))
    return tuple(found)


def _choose(option: str, word: str, known: Iterable[str]) -> str:
    if word not in known:
        raise ValueError(f'{option}: "{word}" is not known{suggestion(word, known, "choose from ")}')
    return word


def _synthetic(options: HardwareOptions) -> tuple[Hardware, tuple[SimulatedModel, ...]]:
    frame = _quantity("--frame", options.frame or FRAME, Size)
    bandwidth = _quantity("--bandwidth", options.bandwidth or BANDWIDTH, Bandwidth)
    base = _quantity("--step-time", options.step_time or STEP_TIME, Duration)
    step = StepTime(
        base,
        _if_given("--prompt-token-time", options.prompt_token_time, Duration),
        _if_given("--request-time", options.request_time, Duration),
    )
    cache = _if_given("--cache-per-token", options.cache_per_token, Size)
    batch = options.batch or BATCH
    frames = _frames(_quantity("--memory", options.memory or MEMORY, Size), frame)
    sizes = _sizes(options.model_size or MODEL_SIZE)
    models = tuple(
        SimulatedModel(f"model {each}", each, step, max_batch_size=batch, cache_bytes_per_token=cache) for each in sizes
    )
    return Hardware(Link(bandwidth), frame, frames), models


def _frames(memory: int, frame: int) -> int:
    if frame > memory:
        raise ValueError(f"--memory: {size(memory)} has no room for one page of {size(frame)} (--frame)")
    return memory // frame


def _sizes(text: str) -> list[int]:
    """One size, or several between commas, which models have in turn."""
    return [_quantity("--model-size", part, Size) for part in text.split(",")]


def _measured(path: Path, options: HardwareOptions) -> tuple[Hardware, tuple[SimulatedModel, ...]]:
    """A profile, with what else was given in place of what was measured."""
    profile = Profile.read(path)
    device, models = profile.hardware, profile.models
    if not models:
        raise ValueError(f"{path}: no model in it")
    told = ("frame", "step_time", "prompt_token_time", "request_time", "cache_per_token")
    _refuse(options, told, "is for hardware without --profile, which tells it")
    if options.bandwidth is not None:
        link = replace(device.link, bandwidth=_quantity("--bandwidth", options.bandwidth, Bandwidth))
        device = replace(device, link=link)
    if options.memory is not None:
        device = device.with_frames(_frames(_quantity("--memory", options.memory, Size), device.frame_bytes))
    if options.model_size is not None:
        sizes = cycle(_sizes(options.model_size))
        models = tuple(replace(model, bytes=each) for model, each in zip(models, sizes, strict=False))
    if options.batch is not None:
        models = tuple(replace(model, max_batch_size=options.batch) for model in models)
    return device, models


def _names(count: int | None, shapes: Sequence[SimulatedModel], *, measured: bool) -> tuple[str, ...]:
    if measured and count is None:
        return tuple(model.name for model in shapes)
    count = MODELS if count is None else count
    return tuple(f"model-{number:0{len(str(count - 1))}}" for number in range(count))


def _models(names: Sequence[str], shapes: Sequence[SimulatedModel]) -> tuple[SimulatedModel, ...]:
    """Those of the profile if the names are theirs; if none is, models that are like them, in turn."""
    known = {model.name: model for model in shapes}
    missing = [name for name in names if name not in known]
    if not missing:
        return tuple(shapes)
    if len(missing) < len(names):
        raise ValueError(f"the profile has some of the workload's models, but not {', '.join(missing)}")
    return tuple(
        replace(shape, name=name) for name, shape in zip(names, islice(cycle(shapes), len(names)), strict=True)
    )


def _synthetic_workload(options: WorkloadOptions, names: Sequence[str]) -> Workload:
    _refuse(options, ("trace_format", "speed_up", "overlay"), "needs a --trace")
    rate = RATE if options.rate is None else options.rate
    if rate <= 0:
        raise ValueError(f"--rate must be more than 0 requests a second, not {rate:g}")
    settings = Settings(
        zipf(names, rate, ZIPF if options.zipf is None else options.zipf),
        _quantity("--duration", options.duration or DURATION, Duration),
        CV if options.cv is None else options.cv,
        options.seed,
        _lengths("--prompt-tokens", options.prompt_tokens),
        _lengths("--output-tokens", options.output_tokens),
    )
    workload = generate(settings)
    if not workload.arrivals:
        raise ValueError("no request comes: choose a higher --rate or a longer --duration")
    return workload


def _traced(options: WorkloadOptions, hardware: HardwareOptions, names: Sequence[str]) -> Workload:
    assert options.trace is not None
    own = ("rate", "cv", "duration", "prompt_tokens", "output_tokens")
    _refuse(options, own, "does not go with --trace, which tells it; --sweep-load or --speed-up change the load")
    kind = _choose("--trace-format", options.trace_format or "csv", ("csv", "gentd26", "azure"))
    if kind == "azure":
        exponent = ZIPF if options.zipf is None else options.zipf
        workload = read_azure(options.trace, names, zipf=exponent, seed=options.seed)
    else:
        _refuse(options, ("zipf",), "does not go with this trace, which names its models")
        if hardware.models is not None:
            raise ValueError("--models does not go with this trace, which names its models")
        workload = (read_gentd26 if kind == "gentd26" else read_csv)(options.trace)
    if options.overlay is not None:
        workload = overlay(workload, options.overlay)
    return workload if options.speed_up is None else speed_up(workload, options.speed_up)


def _refuse(options: HardwareOptions | WorkloadOptions, names: Sequence[str], why: str) -> None:
    for field in fields(options):
        if field.name in names and getattr(options, field.name) is not None:
            raise ValueError(f"--{field.name.replace('_', '-')} {why}")


def _lengths(option: str, text: str | None) -> Lengths:
    """A number, `mean,sd` of a log-normal distribution, or a file whose lengths are drawn from."""
    if text is None:
        return Constant()
    parts = text.split(",")
    try:
        if len(parts) == 1:
            return Constant(int(text))
        mean, deviation = (float(part) for part in parts)
        return LogNormal(mean, deviation)
    except ValueError as error:
        path = Path(text)
        if path.is_file():
            return Empirical(read_lengths(path, "prompt_tokens" if option == "--prompt-tokens" else "output_tokens"))
        raise ValueError(f'{option}: "{text}" is no number from 1, no "mean,sd" and no file with lengths') from error


def _listed(option: str, text: str | None, kind: Callable[[str], N], what: str) -> tuple[N, ...]:
    """Ascending, each once."""
    if text is None:
        return ()
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise ValueError(f'{option}: "{text}" is no list of {what}')
    return tuple(found)


def _if_given(option: str, text: str | None, kind: Any) -> Any:
    """0 of what was not given."""
    return kind(0) if text is None else _quantity(option, text, kind)


def _quantity(option: str, text: str, kind: Any) -> Any:
    """Raises ValueError that names the option, also for nothing at all."""
    try:
        value = convert(text, kind)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if value <= 0:
        raise ValueError(f'{option}: must be more than nothing, not "{text}"')
    return value
