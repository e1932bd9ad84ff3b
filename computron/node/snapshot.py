"""What a node tells about itself: figures for /metrics, /v1/models and /health, taken at one moment."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from computron.execution.blocks import BLOCK_TOKENS
from computron.node.served_model import ServedModel
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
    """`state`: absent, partial, loading, resident or running. `resident_ratio`: share of its pages, 0 to 1.

    `pages`: of the node that holds most. `segments`: pieces that a run can wait for one by one, on this node.
    `cache_bytes_per_token`: of the KV cache, on the node where it is largest; 0 without a cache.
    `overlaps`: in a pipeline several of its steps are under way at once.
    """

    model: str
    task: str
    state: str
    nbytes: int
    pages: int
    segments: int
    cache_bytes_per_token: float
    overlaps: bool
    resident_ratio: float = 0.0
    queue_depth: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """`reason`: why it is in a state in which it takes no requests. `requests`: those not yet answered.

    `frames` of `page_bytes` each: what every node's device is cut into; `stages`: of the pipeline; 0: not known yet.

    `nodes`: the devices of the group by rank, those that are there; `missing_nodes`: how many are not.
    """

    state: NodeState
    reason: str | None
    requests: int
    models: tuple[ModelSnapshot, ...] = ()
    nodes: Mapping[int, Figures] = field(default_factory=dict)
    missing_nodes: int = 0
    recoveries: int = 0
    frames: int = 0
    page_bytes: int = 0
    stages: int = 0


def model_snapshots(models: Mapping[str, ServedModel], scheduler: Scheduler | None) -> tuple[ModelSnapshot, ...]:
    """What the scheduler knows of each model; without a scheduler nothing is on the device."""
    return tuple(_snapshot(name, served, scheduler) for name, served in models.items())


def _snapshot(model: str, served: ServedModel, scheduler: Scheduler | None) -> ModelSnapshot:
    plan, held = served.plan, served.held
    at_rest = ModelSnapshot(
        model=model,
        task=plan.config.task,
        state="absent",
        nbytes=held.nbytes,
        pages=len(held.pages),
        segments=len(plan.image.segment_ends),
        cache_bytes_per_token=held.block_bytes / BLOCK_TOKENS,
        overlaps=served.executor.overlaps,
    )
    if scheduler is None:
        return at_rest
    return replace(
        at_rest,
        state=scheduler.state(model),
        resident_ratio=scheduler.resident_fraction(model),
        queue_depth=scheduler.queue_depth(model),
        running=scheduler.running_count(model),
    )
