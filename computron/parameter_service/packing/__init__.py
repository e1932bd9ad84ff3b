"""Which blocks go to which aggregator. Pure: no input or output, no clock; what is simulated is what runs."""

from __future__ import annotations

from computron.parameter_service.packing.cyclic import Cyclic
from computron.parameter_service.packing.fleet import Change, Fleet, Held, Move, Plan
from computron.parameter_service.packing.loads import BlockLoad, Capacity, DoesNotFit, JobLoad, Limits
from computron.parameter_service.packing.packer import Packer
from computron.parameter_service.packing.utilisation import Utilisation

PACKERS: dict[str, type[Packer]] = {"cyclic": Cyclic, "utilisation": Utilisation}

__all__ = [
    "PACKERS",
    "BlockLoad",
    "Capacity",
    "Change",
    "Cyclic",
    "DoesNotFit",
    "Fleet",
    "Held",
    "JobLoad",
    "Limits",
    "Move",
    "Packer",
    "Plan",
    "Utilisation",
]
