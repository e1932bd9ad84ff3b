"""Which group of devices a request goes to. Pure: no clock, no input or output, nothing but the standard library."""

from __future__ import annotations

from collections.abc import Callable

from computron.routing.fleet import Fleet, GroupSize, GroupView, ModelFacts
from computron.routing.hashed import Hashed
from computron.routing.least_loaded import LeastLoaded
from computron.routing.resident import Resident
from computron.routing.router import NoGroupError, Router, Routing
from computron.routing.tuning import Tuning

ROUTERS: dict[str, Callable[[], Routing]] = {"resident": Resident, "least-loaded": LeastLoaded, "hash": Hashed}

__all__ = [
    "ROUTERS",
    "Fleet",
    "GroupSize",
    "GroupView",
    "ModelFacts",
    "NoGroupError",
    "Router",
    "Routing",
    "Tuning",
]
