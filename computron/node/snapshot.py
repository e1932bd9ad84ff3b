"""What a node tells about itself: figures for /metrics, /v1/models and /health, taken at one moment."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from computron.node.worker import Worker
from computron.scheduling.scheduler import Scheduler


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
    """Memory figures are bytes by state; requests are those not yet answered; the rest counts since the start."""

    state: NodeState
    failure: str | None
    requests: int
    models: tuple[ModelSnapshot, ...]
    device_memory: dict[str, int]
    host_memory: dict[str, int]
    pages_shared: int
    transfer_bytes: int
    swaps: dict[str, int]  # swap-ins by how they ended: done, failed, cancelled
    link_busy_seconds: float
    host_pages_on_disk: int


def take_snapshot(
    state: NodeState, failure: str | None, requests: int, worker: Worker | None, scheduler: Scheduler | None
) -> NodeSnapshot:
    """Ask the scheduler and the memory how they stand; models are empty while the node starts and after its end."""
    if worker is None or scheduler is None or state is NodeState.STARTING:
        return NodeSnapshot(state, failure, requests, (), {}, {}, 0, 0, {}, 0.0, 0)
    models = tuple(
        ModelSnapshot(
            model=model,
            task=served.plan.config.task,
            state=scheduler.state(model),
            nbytes=served.image.nbytes,
            resident_ratio=scheduler.resident_fraction(model),
            queue_depth=scheduler.queue_depth(model),
            running=scheduler.running_count(model),
        )
        for model, served in worker.models.items()
    )
    host, device, page = worker.store.statistics(), worker.swapper.statistics(), worker.page_bytes
    return NodeSnapshot(
        state=state,
        failure=failure,
        requests=requests,
        models=models,
        device_memory={
            "parameters": device.parameter_frames * page,
            "cache": device.cache_frames * page,
            "free": device.free_frames * page,
        },
        host_memory={"used": host.used, "free": host.budget - host.used},
        pages_shared=host.shared_pages,
        transfer_bytes=device.bytes_moved,
        swaps={"done": device.swaps_done, "failed": device.swaps_failed, "cancelled": device.swaps_cancelled},
        link_busy_seconds=device.link_seconds,
        host_pages_on_disk=host.on_disk_pages,
    )
