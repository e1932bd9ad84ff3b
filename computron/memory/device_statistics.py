"""What a device tells of its memory and its link."""

from __future__ import annotations

from dataclasses import dataclass


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
