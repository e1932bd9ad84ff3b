"""One model on the device at a time, as llama-swap does by default."""

from __future__ import annotations

from computron.scheduling.policies.lru import Lru
from computron.scheduling.scheduler import Scheduler
from computron.simulation.systems.system import Setup, System


class OneAtATime(Lru):
    """A model has the device until an older request waits for another one, which then has it.

    Only for models that answer in one step: sequences would have to be finished first, however long others wait.
    """

    name = "one-at-a-time"
    alone = True


def _build(setup: Setup) -> Scheduler:
    if any(model.continuous for model in setup.models):
        raise ValueError("one-at-a-time is simulated only for models that answer in one step")
    return setup.scheduler(OneAtATime())


ONE_AT_A_TIME = System("one-at-a-time", _build)
