"""Jobs and aggregators as JSON objects, for REST, `top` and metrics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from computron.parameter_service.master.loads import compute_of, iteration_of, observed_loss
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.placement import memory_used
from computron.parameter_service.master.state import Aggregator, Job, memory_of


def job_view(master: Master, job: Job) -> dict[str, Any]:
    """Times in seconds, memory in bytes, losses as shares of an iteration; null: not known yet."""
    iteration = iteration_of(job)
    spec = job.book.spec
    places = _places(master, job)
    snapshot = max((saved.step for saved in job.book.counted), default=None)
    return {
        "id": job.name,
        "object": "job",
        "state": state_of(job),
        "reason": _reason(job),
        "epoch": job.book.epoch,
        "step": job.step or snapshot or 0,  # a master that began anew has not heard of the steps of idle jobs
        "workers": sorted(set(job.book.members) - set(job.book.gone)),
        "connected_workers": [worker.rank for worker in job.linked],
        "optimizer": spec.optimizer,
        "parameters": sum(tensor.elements for tensor in spec.tensors),
        "memory": sum(memory_of(job, block) for block in range(len(job.layout.blocks))),
        "blocks": len(job.layout.blocks),
        "aggregators": dict(sorted(places.items())),
        "blocks_nowhere": len(job.book.owners) - places.total(),
        "moving": len(job.book.moving),
        "iteration_seconds": iteration,
        "compute_seconds": compute_of(job),
        "steps_per_second": 1 / iteration if iteration else None,
        "loss": observed_loss(master.state, job),
        "predicted_loss": master.scaling.predicted.get(job.name),
        "loss_limit": spec.loss_limit,
        "cpu_seconds": job.cpu_total,
        "late_seconds": job.late,
        "migrations": job.book.moves,
        "lost_steps": job.book.lost,
        "snapshot_step": snapshot,
        "versions": sorted(job.book.versions),
        "quota": master.state.book.quotas.get(job.name, master.state.limits.max_job_memory),
    }


def _reason(job: Job) -> str:
    if job.failed:
        return job.failed
    if job.change is not None:
        return job.change.reason
    if job.book.placed is None:
        return f"{len(job.linked)} of {job.book.spec.workers} workers have come"
    return job.trouble or job.unpublished


def state_of(job: Job) -> str:
    """failed, gathering (its workers have not all come), reconfiguring, idle (no worker) or running."""
    if job.failed is not None:
        return "failed"
    if job.change is not None:
        return "reconfiguring"
    if job.book.placed is None:
        return "gathering"
    return "running" if job.workers else "idle"


def versions_view(job: Job) -> list[dict[str, Any]]:
    return [
        {"id": saved.version, "object": "version", "step": saved.step, "path": saved.path, "created": int(saved.at)}
        for saved in sorted(job.book.versions.values(), key=lambda saved: (saved.step, saved.version))
    ]


def aggregator_view(master: Master, known: Aggregator) -> dict[str, Any]:
    usage = known.usage
    address = known.address
    return {
        "id": known.id,
        "object": "aggregator",
        "state": _state(known),
        "address": None if address is None else f"{address.host}:{address.port}",
        "pid": known.pid,
        "utilisation": usage.busy / usage.seconds if usage is not None and usage.seconds else None,
        "cpu_seconds": known.cpu,
        "memory": known.memory,
        "memory_used": usage.memory if usage is not None else memory_used(master.state).get(known.id, 0),
        "jobs": {
            name: count for name, job in sorted(master.state.jobs.items()) if (count := _places(master, job)[known.id])
        },
    }


def _places(master: Master, job: Job) -> Counter[str]:
    """How many blocks each aggregator has. Those of one that died are nowhere, until the job goes on."""
    idle = state_of(job) == "idle"
    known = master.state.aggregators
    return Counter(name for name in job.book.owners if name in known and not (idle and _lacks(known[name], job)))


def _lacks(known: Aggregator, job: Job) -> bool:
    """Whether it has said that nothing of the job is there: it may have the name of one that died."""
    return known.usage is not None and all(used.job != job.name for used in known.usage.jobs)


def _state(known: Aggregator) -> str:
    if known.stopping:
        return "stopping"
    if known.address is None and known.link is None:
        return "starting"
    if known.link is None:
        return "away"
    return "draining" if known.draining else "up"
