"""A workload through the real scheduler, on hardware that exists only in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

from computron.scheduling.events import ModelSpec
from computron.simulation.clock import Clock
from computron.simulation.future import Future
from computron.simulation.group import VirtualGroup
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.log import Log
from computron.simulation.systems import SYSTEMS, Setup, System
from computron.simulation.workload import Arrival, Workload


def simulate(
    workload: Workload,
    hardware: Hardware,
    models: Sequence[SimulatedModel],
    *,
    system: str | System = "default",
    max_wait: float = 30.0,
    warm: bool = True,
) -> Log:
    """What the system makes of the workload.

    warm: before the first arrival one request to each model has been served, in order, none of it in the log.
    Raises ValueError for an unknown system or model, and for a model that does not fit the device.
    """
    if isinstance(system, str):
        if system not in SYSTEMS:
            raise ValueError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
        system = SYSTEMS[system]
    unknown = {arrival.model for arrival in workload.arrivals} - {model.name for model in models}
    if unknown:
        raise ValueError(f"the workload has requests for models that are not described: {', '.join(sorted(unknown))}")
    hardware = system.hardware(hardware, models)
    for model in models:
        if model.pages(hardware.frame_bytes) > hardware.frames:
            raise ValueError(
                f"model {model.name!r} takes {model.bytes} bytes of a device that has "
                f"{hardware.frames * hardware.frame_bytes}"
            )
    return _Simulation(workload, hardware, models, system, max_wait).run(warm)


class _Simulation:
    def __init__(
        self, workload: Workload, hardware: Hardware, models: Sequence[SimulatedModel], system: System, max_wait: float
    ) -> None:
        self._arrivals = workload.arrivals
        self._models = models
        self._overhead = hardware.request_overhead
        self._clock = Clock()
        self._log = Log(len(workload.arrivals))
        self._future = Future(workload.arrivals, hardware.request_overhead)
        specs = model_specs(models, hardware)
        setup = Setup(hardware, models, specs, max_wait, self._future)
        self._group = VirtualGroup(
            0, self._clock, hardware, models, system.build(setup), system.surroundings, self._log, self._future
        )
        self._group.add_models(specs)

    def run(self, warm: bool) -> Log:
        clock, group, log = self._clock, self._group, self._log
        if warm:
            for number, model in enumerate(self._models):
                group.arrive(-1 - number, Arrival(0.0, model.name))
                while group.live:
                    clock.advance()
            while group.at_work:
                clock.advance()
        log.forget_rows()
        epoch = self._future.begin = clock.now
        for number, arrival in enumerate(self._arrivals):
            log.arrived[number] = arrival.time
            time = epoch + arrival.time + self._overhead
            while (following := clock.next_time) is not None and following <= time:
                clock.advance()
            clock.now = time
            group.arrive(number, arrival)
        while group.live or group.at_work:
            clock.advance()
        log.ended = clock.now - epoch
        return log


def model_specs(models: Sequence[SimulatedModel], hardware: Hardware) -> list[ModelSpec]:
    """The models as the scheduler sees them. Every page has a content of its own, but for those that are shared."""
    contents = count()
    shared: dict[str, list[int]] = {}
    specs = []
    for model in models:
        pages = model.pages(hardware.frame_bytes)
        same = math.floor(pages * model.shared) if model.shares is not None else 0
        known = shared.setdefault(model.shares, []) if model.shares is not None else []
        known += [next(contents) for _ in range(same - len(known))]
        own = [next(contents) for _ in range(pages - same)]
        token_bytes = model.cache_bytes_per_token * hardware.block_tokens
        specs.append(
            ModelSpec(
                model.name,
                (*known[:same], *own),
                (pages,),
                model.max_batch_size,
                model.max_queue,
                continuous=model.continuous,
                blocks_per_frame=hardware.frame_bytes / token_bytes if token_bytes else 0.0,
            )
        )
    return specs
