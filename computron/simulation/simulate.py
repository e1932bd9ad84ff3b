"""A workload through the real scheduler, on hardware that exists only in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

from computron.scheduling.events import ModelSpec
from computron.simulation.clock import Clock
from computron.simulation.cluster import Cluster, Reports, router_of
from computron.simulation.future import Future
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.log import Log
from computron.simulation.systems import SYSTEMS, Setup, System
from computron.simulation.workload import Arrival, Workload

LONGEST = 1e9  # seconds, three decades: later, a clock in floating point is too coarse for steps


def simulate(
    workload: Workload,
    hardware: Hardware,
    models: Sequence[SimulatedModel],
    *,
    system: str | System = "default",
    groups: int = 1,
    router: str = "resident",
    max_wait: float = 30.0,
    warm: bool = True,
) -> Log:
    """What the system makes of the workload.

    hardware: of each of `groups`, before which `router`, a name of `ROUTERS`, decides; one group has none.
    warm: before the first arrival one request to each model has been served, in order, none of it in the log; by
    every group where all models are resident, else by the group that the router chose.
    Raises ValueError for an unknown system, router or model, for a model that does not fit the device, and for
    arrivals that go on for decades.
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
    if workload.arrivals and workload.arrivals[-1].time > LONGEST:
        raise ValueError(
            f"the last request comes after {workload.arrivals[-1].time:g} s, at most {LONGEST:g} are simulated"
        )
    if groups < 1:
        raise ValueError(f"a simulation needs at least one group, not {groups}")
    return _Simulation(workload, hardware, models, system, max_wait, groups, router).run(warm)


class _Simulation:
    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        models: Sequence[SimulatedModel],
        system: System,
        max_wait: float,
        groups: int,
        router: str,
    ) -> None:
        self._arrivals = workload.arrivals
        self._models = models
        self._everywhere = hardware.frames >= sum(model.pages(hardware.frame_bytes) for model in models)
        self._overhead = hardware.request_overhead
        self._clock = clock = Clock()
        self._log = Log(len(workload.arrivals), groups)
        self._foresees = system.foresees
        self._future = Future(workload.arrivals, hardware.request_overhead)
        specs = model_specs(models, hardware)
        setup = Setup(hardware, models, max_wait, self._future)
        chooser = router_of(router, models, hardware, groups)
        reports = Reports(clock, chooser, hardware.frame_bytes) if groups > 1 else None
        self._cluster = Cluster(
            clock,
            [
                system.group(
                    number,
                    clock,
                    hardware,
                    models,
                    system.build(setup),
                    system.surroundings,
                    self._log,
                    self._future,
                    reports,
                )
                for number in range(groups)
            ],
            chooser if groups > 1 else None,
            self._log,
        )
        for group in self._cluster.groups:
            group.add_models(specs)

    def run(self, warm: bool) -> Log:
        clock, cluster, log = self._clock, self._cluster, self._log
        if warm:
            self._future.begin = math.inf
            self._warm_up()
        log.forget_rows()
        epoch = self._future.begin = clock.now
        if self._foresees:
            for group in cluster.groups:
                group.wake()
        for number, arrival in enumerate(self._arrivals):
            log.arrived[number] = arrival.time
            time = epoch + arrival.time + self._overhead
            while (following := clock.next_time) is not None and following <= time:
                clock.advance()
            clock.now = time
            cluster.arrive(number, arrival)
        while cluster.busy:
            clock.advance()
        log.ended = clock.now - epoch
        return log

    def _warm_up(self) -> None:
        clock, cluster = self._clock, self._cluster
        for number, model in enumerate(self._models):
            arrival = Arrival(0.0, model.name)
            if self._everywhere:
                for group in cluster.groups:
                    group.arrive(-1 - number, arrival)
            else:
                cluster.arrive(-1 - number, arrival)
            while any(group.live for group in cluster.groups):
                clock.advance()
        while cluster.busy:
            clock.advance()


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
