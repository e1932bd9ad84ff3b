"""A system: a scheduler, the hardware that it sees, and what it does around its scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from computron.scheduling.policies.policy import Policy
from computron.scheduling.scheduler import Scheduler
from computron.scheduling.tuning import Tuning
from computron.simulation.future import Future
from computron.simulation.group import Decider, VirtualGroup
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.surroundings import Surroundings


@dataclass(frozen=True, slots=True)
class Setup:
    """What a system is built for. Only bounds may look at `future`."""

    hardware: Hardware
    models: Sequence[SimulatedModel]
    max_wait: float
    future: Future

    def scheduler(self, policy: str | Policy, *, prefetch: bool = True, tuning: Tuning | None = None) -> Scheduler:
        hardware = self.hardware
        return Scheduler(
            frames=hardware.frames,
            frame_bytes=hardware.frame_bytes,
            link_bandwidth_hint=hardware.link.bandwidth,
            policy=policy,
            max_wait=self.max_wait,
            prefetch=prefetch,
            max_steps_in_flight=hardware.stages,
            tuning=tuning,
        )


def _as_it_is(hardware: Hardware, models: Sequence[SimulatedModel]) -> Hardware:
    return hardware


@dataclass(frozen=True, slots=True)
class System:
    """build: its scheduler. hardware: what it may use of what there is. group: what carries out its actions.

    foresees: it is asked what to do when the workload begins, before anything has come.
    """

    name: str
    build: Callable[[Setup], Decider]
    surroundings: Surroundings = field(default_factory=Surroundings)
    hardware: Callable[[Hardware, Sequence[SimulatedModel]], Hardware] = _as_it_is
    group: type[VirtualGroup] = VirtualGroup
    foresees: bool = False
