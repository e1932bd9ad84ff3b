"""What a device tells of its memory and its link."""

from __future__ import annotations

from dataclasses import dataclass

from computron.memory.residency import FrameCounts
from computron.memory.swap import SwapOutcome, SwapState


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Frames by use, and totals since the start."""

    frames: int
    free_frames: int
    parameter_frames: int
    cache_frames: int
    arriving_frames: int  # of parameter_frames: with a transfer under way
    shared_frames: int  # of parameter_frames: mapped at several places
    bytes_moved: int
    bytes_shared: int  # bytes of swap-ins that did not move, their content being on the device
    swaps_done: int
    swaps_failed: int
    swaps_cancelled: int
    link_seconds: float  # in which the link was busy


class SwapTotals:
    """Adds up swaps as they end."""

    def __init__(self) -> None:
        self._ended: dict[SwapState, int] = {"done": 0, "failed": 0, "cancelled": 0}
        self._bytes_moved = 0
        self._bytes_shared = 0

    def add(self, outcome: SwapOutcome, nbytes: int) -> None:
        """`nbytes`: of its pages."""
        self._ended[outcome.state] += 1
        self._bytes_moved += outcome.bytes_moved
        if outcome.state == "done":
            self._bytes_shared += nbytes - outcome.bytes_moved

    def statistics(self, frames: int, counts: FrameCounts, link_seconds: float) -> DeviceStatistics:
        return DeviceStatistics(
            frames=frames,
            free_frames=counts.free,
            parameter_frames=counts.parameters,
            cache_frames=counts.cache,
            arriving_frames=counts.arriving,
            shared_frames=counts.shared,
            bytes_moved=self._bytes_moved,
            bytes_shared=self._bytes_shared,
            swaps_done=self._ended["done"],
            swaps_failed=self._ended["failed"],
            swaps_cancelled=self._ended["cancelled"],
            link_seconds=link_seconds,
        )
