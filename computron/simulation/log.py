"""What happened in a simulation, as columns and rows of numbers; nothing is summed up here."""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple


class SwapRow(NamedTuple):
    """A transfer. ordered <= ended; it had the link for `busy` seconds between. `frames`: as many as came. `complete`:
    after it all of the model was there.
    """

    group: int
    model: str
    ordered: float
    ended: float
    busy: float
    frames: int
    urgency: int
    cancelled: bool
    complete: bool


class StepRow(NamedTuple):
    """A step held the device from `started` to `ended`, and computed for `compute` seconds of them."""

    group: int
    model: str
    started: float
    ended: float
    compute: float
    requests: int


class EvictionRow(NamedTuple):
    """Frames given up by a model. `written`: seconds of the link from the device that writing them back took."""

    group: int
    model: str
    time: float
    frames: int
    written: float


class Log:
    """Requests are numbered as in the workload. Times of what has not happened (yet) are NaN."""

    def __init__(self, requests: int, groups: int = 1) -> None:
        self.groups = groups
        self.arrived = array("d", [math.nan]) * requests  # when the client sent it
        self.noticed = array("d", [math.nan]) * requests  # by a system that counts a request's time from then on
        self.started = array("d", [math.nan]) * requests  # its first step
        self.first_token = array("d", [math.nan]) * requests  # at the client
        self.finished = array("d", [math.nan]) * requests  # at the client
        self.group = array("i", [-1]) * requests
        self.rejected: dict[int, str] = {}  # request -> reason
        self.swaps: list[SwapRow] = []
        self.steps: list[StepRow] = []
        self.evictions: list[EvictionRow] = []
        self.ended = 0.0  # when nothing was left to do

    def forget_rows(self) -> None:
        """What has happened so far does not count."""
        self.swaps.clear()
        self.steps.clear()
        self.evictions.clear()
