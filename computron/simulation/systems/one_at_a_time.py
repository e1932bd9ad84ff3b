"""One model on the device at a time, as llama-swap does by default."""

from __future__ import annotations

from computron.scheduling.policies.lru import Lru
from computron.simulation.systems.system import System


class OneAtATime(Lru):
    """A model has the device until an older request waits for another one, which then has it.

    Sequences that were begun are finished first, however long that takes: a server would break its promise of
    `max_wait` with it, so that it can only be simulated.
    """

    name = "one-at-a-time"
    alone = True


ONE_AT_A_TIME = System("one-at-a-time", lambda setup: setup.scheduler(OneAtATime()))
