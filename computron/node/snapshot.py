"""What a node tells about itself: figures for /metrics, /v1/models and /health, taken at one moment."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from computron.node.crew import ServedModel
from computron.node.wire import Figures
from computron.scheduling.scheduler import Scheduler


class NodeState(enum.StrEnum):
    """`recovering`: the group lost a node and is being formed anew."""

    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
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
    """`reason`: why it is in a state in which it takes no requests. `requests`: those not yet answered.

    `nodes`: the devices of the group by rank, those that are there; `missing_nodes`: how many are not.
    """

    state: NodeState
    reason: str | None
    requests: int
    models: tuple[ModelSnapshot, ...] = ()
    nodes: Mapping[int, Figures] = field(default_factory=dict)
    missing_nodes: int = 0
    recoveries: int = 0


def model_snapshots(models: Mapping[str, ServedModel], scheduler: Scheduler | None) -> tuple[ModelSnapshot, ...]:
    """What the scheduler knows of each model; without a scheduler nothing is on the device."""
    return tuple(_snapshot(name, served, scheduler) for name, served in models.items())


def _snapshot(model: str, served: ServedModel, scheduler: Scheduler | None) -> ModelSnapshot:
    task, nbytes = served.plan.config.task, served.held.nbytes
    if scheduler is None:
        return ModelSnapshot(model, task, "absent", nbytes, 0.0, 0, 0)
    return ModelSnapshot(
        model=model,
        task=task,
        state=scheduler.state(model),
        nbytes=nbytes,
        resident_ratio=scheduler.resident_fraction(model),
        queue_depth=scheduler.queue_depth(model),
        running=scheduler.running_count(model),
    )
