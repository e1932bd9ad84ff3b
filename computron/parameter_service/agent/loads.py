"""Which states the workers have loaded, as one of them knows it."""

from __future__ import annotations

from computron.parameter_service.wire.messages import Placement


class Loads:
    """begun: how many. done: how many of them no failure can lose. brings: this worker is to bring the last one."""

    def __init__(self) -> None:
        self.begun = self.done = 0
        self.brings = False

    def placed(self, placement: Placement) -> None:
        self.begun, self.done = placement.loads, placement.loads - placement.loading
        self.brings = placement.loading and placement.initialise

    def loaded(self, number: int) -> None:
        """The master says so."""
        if number == self.begun:
            self.done = number
