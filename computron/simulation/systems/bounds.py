"""Systems that have, or know, what no real one does.

They queue and choose as the default policy does; a cleverer order of the same requests could still pass them. What
comes is known of each model on the whole, not group by group, so that behind a router they are no bounds at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from computron.scheduling.estimates import residual_life
from computron.scheduling.models import ModelState
from computron.scheduling.policies.default import Default
from computron.simulation.future import Future
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.systems.system import System


def _room_for_all(hardware: Hardware, models: Sequence[SimulatedModel]) -> Hardware:
    """Every model has its pages, and KV caches have as much as the whole device had."""
    return hardware.with_frames(hardware.frames + sum(model.pages(hardware.frame_bytes) for model in models))


class Clairvoyant(Default):
    """The default policy, except that it knows when each model's next request comes.

    So pages leave where they are wanted latest: Belady's rule (A study of replacement algorithms for a virtual-storage
    computer, 1966), on pages.
    """

    name = "clairvoyant"

    def __init__(self, future: Future) -> None:
        self._future = future

    def next_in(self, model: ModelState, now: float) -> float:
        return self._future.next_arrival(model.name, now) - now

    def variation(self, model: ModelState) -> float:
        return 0.0

    def next_request(self, model: ModelState, now: float) -> float | None:
        expected = self._future.next_arrival(model.name, now)
        return expected if math.isfinite(expected) else None


class Informed(Default):
    """The default policy, except that it need not learn how often and how regularly each model is asked for.

    What it lacks to `Clairvoyant` is chance, what the default policy lacks to it is what there was to learn.
    """

    name = "informed"

    def __init__(self, future: Future) -> None:
        self._future = future
        self._variation = future.variation()

    def next_in(self, model: ModelState, now: float) -> float:
        mean = self._future.mean_interval(model.name)
        return residual_life(mean, self._variation, model.arrivals.silence(now)) if math.isfinite(mean) else mean

    def missed_in(self, model: ModelState, now: float) -> float:
        return self.next_in(model, now)

    def variation(self, model: ModelState) -> float:
        return self._variation


ALL_RESIDENT = System("all-resident", lambda setup: setup.scheduler("default"), hardware=_room_for_all)
INFORMED = System("informed", lambda setup: setup.scheduler(Informed(setup.future)))
CLAIRVOYANT = System("clairvoyant", lambda setup: setup.scheduler(Clairvoyant(setup.future), prefetch=False))
CLAIRVOYANT_PREFETCH = System(
    "clairvoyant-prefetch", lambda setup: setup.scheduler(Clairvoyant(setup.future)), foresees=True
)
