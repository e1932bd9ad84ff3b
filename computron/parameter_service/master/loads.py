"""What is known of jobs and aggregators, as packers want to have it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from computron.parameter_service.master.state import REPORTS, Job, State, memory_of
from computron.parameter_service.packing import BlockLoad, Capacity, Fleet, JobLoad
from computron.parameter_service.specs import gradient_bytes

# Seconds of a compute thread for one element of a block, until an aggregator has measured it: torch's fused kernels on
# one thread, 25 million elements, with one addition of a second worker's gradients.
SECONDS_PER_ELEMENT = {"sgd": 3.4e-10, "adam": 4.6e-10, "adamw": 4.6e-10, "sum": 2.6e-10}
UNMEASURED_OVERHEAD = 3e-3  # seconds of an iteration that a job that always shared is not held to lose by that
UNKNOWN_COMPUTE = 3.0  # of a job not measured yet: seconds of compute for one second of aggregation


def load_of(state: State, job: Job) -> JobLoad:
    """A job's load, relative to one aggregator of its own: what it waits for the service there counts as compute."""
    each = SECONDS_PER_ELEMENT.get(job.book.spec.optimizer, SECONDS_PER_ELEMENT["adamw"])
    remote = _is_remote(state, job)
    copies = 2 * max(1, len(job.workers))  # of each block in a step: gradients in and parameters out
    blocks = tuple(
        BlockLoad(
            block=block.index,
            cpu=job.cpu.get(block.index, block.elements * each),
            memory=room,
            network=copies * block.nbytes if remote else 0,
        )
        for block, room in zip(job.layout.blocks, room_of(state, job), strict=True)
    )
    cpu = sum(load.cpu for load in blocks)
    compute = compute_of(job)
    period = cpu + (UNKNOWN_COMPUTE * cpu if compute is None else compute + overhead_of(job))
    return JobLoad(job.name, period * (1 + 1e-9), blocks, job.book.spec.loss_limit)


def room_of(state: State, job: Job) -> list[int]:
    """What each block takes of an aggregator's memory: its state, and the gradients of workers that push them there."""
    machines = _machines(state)
    pushing = sum(machines != {worker.machine} for worker in job.workers.values() if worker.machine)
    return [memory_of(job, block.index) + pushing * gradient_bytes(job.book.spec, block) for block in job.layout.blocks]


def compute_of(job: Job) -> float | None:
    """Seconds of an iteration in which the slowest worker computes; None if nobody has said so yet."""
    times = [worker.compute for worker in job.workers.values() if worker.compute]
    return max(times) if times else None


def iteration_of(job: Job) -> float | None:
    """Seconds from step to step as the slowest worker sees them: it waits for the aggregators only, the others for it,
    too.
    """
    times = [(worker.compute, worker.wait) for worker in job.workers.values() if worker.compute]
    if not times:
        return None
    return max(compute for compute, _ in times) + min(wait for _, wait in times)


def is_measured(job: Job) -> bool:
    """Have all workers told often enough how fast they are where the job is now, and the aggregators, too?"""
    return bool(job.cpu and job.workers) and all(len(worker.times) == REPORTS for worker in job.workers.values())


def overhead_of(job: Job) -> float:
    """Seconds of an iteration in which the job waits for the service, but not for work on an aggregator."""
    return min(UNMEASURED_OVERHEAD, unexplained_wait(job)) if job.overhead is None else job.overhead


def unexplained_wait(job: Job) -> float:
    """Seconds of an iteration for which every worker waits longer than the job's busiest aggregator works."""
    work: defaultdict[str, float] = defaultdict(float)
    for block, owner in enumerate(job.book.owners):
        work[owner] += job.cpu.get(block, 0.0)
    waits = [worker.wait for worker in job.workers.values() if worker.compute]
    return max(0.0, min(waits, default=0.0) - max(work.values(), default=0.0))


def observed_loss(state: State, job: Job) -> float | None:
    """Share of its iteration that the job loses against one with an aggregator of its own; None if not measured.

    No more than it waits for others' work: where processes are short of cores, other aggregators would not help.
    """
    iteration = iteration_of(job)
    if iteration is None or not is_measured(job):
        return None
    period = load_of(state, job).period
    waited = max((job.behind.get(owner, 0.0) for owner in job.book.owners), default=0.0)
    lost = min(max(0.0, iteration - period), waited)
    return lost / (period + lost)


def fleet_of(state: State, servers: Iterable[str], *, without: Job | None = None) -> Fleet:
    """Jobs as they are placed on these aggregators. Others' blocks are left out: they are about to leave or to come."""
    names = sorted(servers)
    memory = min((state.aggregators[name].memory for name in names if state.aggregators[name].memory), default=None)
    capacity = Capacity() if memory is None else Capacity(memory=memory)
    fleet = Fleet(capacity=capacity).opened(names)
    for name, job in sorted(state.jobs.items()):
        owners = job.places
        if job is without or not owners or job.failed is not None:
            continue
        if all(owner in fleet.servers for owner in owners):
            fleet = fleet.placing(load_of(state, job), dict(enumerate(owners)))
        if name in state.alone and name in fleet.jobs:
            fleet = replace(fleet, alone=fleet.alone | {name})
    return fleet


def _machines(state: State) -> set[str]:
    return {known.address.machine for known in state.aggregators.values() if known.address is not None}


def _is_remote(state: State, job: Job) -> bool:
    machines = _machines(state)
    return any(worker.machine not in machines for worker in job.workers.values() if worker.machine)
