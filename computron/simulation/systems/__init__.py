"""What can be simulated, by name: Computron's policies, other systems, and bounds."""

from __future__ import annotations

from computron.simulation.systems.bounds import (
    ALL_RESIDENT,
    CLAIRVOYANT,
    CLAIRVOYANT_DEFAULT,
    CLAIRVOYANT_PREFETCH,
)
from computron.simulation.systems.computron2023 import COMPUTRON_2023
from computron.simulation.systems.one_at_a_time import ONE_AT_A_TIME
from computron.simulation.systems.ours import OURS
from computron.simulation.systems.system import Setup, System

_BOUNDS = (ALL_RESIDENT, CLAIRVOYANT, CLAIRVOYANT_PREFETCH, CLAIRVOYANT_DEFAULT)
SYSTEMS: dict[str, System] = {system.name: system for system in (*OURS, ONE_AT_A_TIME, COMPUTRON_2023, *_BOUNDS)}

__all__ = ["SYSTEMS", "Setup", "System"]
