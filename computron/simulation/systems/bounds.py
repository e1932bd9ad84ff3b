"""Systems that have, or know, what no real one does.

They queue and choose as the default policy does; a cleverer order of the same requests could still pass them. So can
the default policy where it has means that a bound lacks: only `clairvoyant-default` has all of them. What comes is
known of each model on the whole, not group by group, so that behind a router they are no bounds at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from computron.scheduling.board import Board
from computron.scheduling.models import ModelState
from computron.scheduling.policies.default import Default, whole_swap_seconds
from computron.scheduling.tuning import Tuning
from computron.simulation.future import Future
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.surroundings import Surroundings
from computron.simulation.systems.system import System

CERTAIN = 1.0  # `fetch_margin` of who knows what comes: nothing is left to chance


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

    def chance(self, model: ModelState, within: float, now: float) -> float:
        """Falls with the time until the next request, so that pages leave in the order of these times."""
        return within / (within + self._future.next_arrival(model.name, now) - now)

    def worth(self, board: Board, model: ModelState, within: float, now: float) -> float:
        return self.chance(model, within, now)

    def missed(self, board: Board, target: ModelState, victim: ModelState, now: float) -> bool:
        return self._future.next_arrival(victim.name, now) - now <= whole_swap_seconds(board, target)

    def next_request(self, model: ModelState, now: float) -> float | None:
        expected = self._future.next_arrival(model.name, now)
        return expected if math.isfinite(expected) else None


def _foreseeing(name: str, *, prefetch: bool) -> System:
    """Clairvoyant about what leaves, on pages, and with prefetch about what comes: swap-ins come as a whole, and a
    model has one step at a time.
    """
    tuning = Tuning(piece=math.inf, fetch_margin=CERTAIN)
    return System(
        name,
        lambda setup: setup.scheduler(Clairvoyant(setup.future), prefetch=prefetch, tuning=tuning),
        surroundings=Surroundings(silent_stages=True),
        foresees=prefetch,
    )


ALL_RESIDENT = System("all-resident", lambda setup: setup.scheduler("default"), hardware=_room_for_all)
CLAIRVOYANT = _foreseeing("clairvoyant", prefetch=False)
CLAIRVOYANT_PREFETCH = _foreseeing("clairvoyant-prefetch", prefetch=True)
CLAIRVOYANT_DEFAULT = System(
    "clairvoyant-default",
    lambda setup: setup.scheduler(Clairvoyant(setup.future), tuning=Tuning(fetch_margin=CERTAIN)),
    foresees=True,
)
