"""What no system can beat, or only one that knows what these know."""

from __future__ import annotations

from collections.abc import Sequence

from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.systems.system import System


def _room_for_all(hardware: Hardware, models: Sequence[SimulatedModel]) -> Hardware:
    """Every model has its pages, and KV caches have as much as the whole device had."""
    return hardware.with_frames(hardware.frames + sum(model.pages(hardware.frame_bytes) for model in models))


ALL_RESIDENT = System("all-resident", lambda setup: setup.scheduler("default"), hardware=_room_for_all)
