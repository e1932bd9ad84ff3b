"""When steps compute: on one stage after the other, each stage one step at a time, segment by segment as pages come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from computron.simulation.clock import Clock


@dataclass(slots=True, eq=False)
class VirtualStep:
    """arrivals: when each segment of a stage has come, None while that is not known. begun: when stage 0 had it.

    freed: called when stage 0 is done with it, if there are others.
    """

    model: str
    requests: tuple[int, ...]
    ordered: float
    compute: float
    arrivals: tuple[float, ...] | None
    done: Callable[[VirtualStep], None]
    freed: Callable[[VirtualStep], None] | None = None
    begun: float = 0.0


class Pipeline:
    """Steps in the order in which they were ordered. One whose pages are still to come holds up those behind it."""

    def __init__(self, clock: Clock, stages: int) -> None:
        self._clock = clock
        self._free = [0.0] * stages
        self._steps: deque[VirtualStep] = deque()

    def start(self, step: VirtualStep) -> None:
        self._steps.append(step)
        self.go_on()

    def go_on(self) -> None:
        """Plan the ends of all steps for which they are known now."""
        while self._steps and self._steps[0].arrivals is not None:
            step = self._steps.popleft()
            self._pass(step, step.arrivals or ())
            if step.freed is not None and len(self._free) > 1:
                self._clock.at(self._free[0], step.freed, step)
            self._clock.at(self._free[-1], step.done, step)

    def _pass(self, step: VirtualStep, arrivals: tuple[float, ...]) -> None:
        """Take the step through the stages, each of which is free when it is through."""
        free, seconds = self._free, step.compute / len(self._free)
        time = step.begun = max(step.ordered, free[0])
        for stage in range(len(free)):
            time = max(time, free[stage])
            if arrivals:
                part = seconds / len(arrivals)
                for arrival in arrivals:
                    time = (arrival if arrival > time else time) + part
            else:
                time += seconds
            free[stage] = time
