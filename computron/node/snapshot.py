"""What a node tells about itself: figures for /metrics, /v1/models and /health, taken at one moment."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class NodeState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """`state`: absent, partial, loading, resident or running. `resident_ratio`: share of its pages, 0 to 1."""

    model: str
    task: str
    state: str
    nbytes: int
    resident_ratio: float
    queue_depth: int
    running: int


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """Memory figures are bytes by state; requests are those not yet answered."""

    state: NodeState
    failure: str | None
    requests: int
    models: tuple[ModelSnapshot, ...]
    device_memory: dict[str, int]
    host_memory: dict[str, int]
    pages_shared: int
    transfer_bytes: int
