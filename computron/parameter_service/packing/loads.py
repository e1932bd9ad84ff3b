"""What is packed: the work of a job for each of its blocks, and what one aggregator can carry."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_ALLOWANCE = 0.001  # seconds by which the work of a step may end late, however little its job may lose


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """cpu: seconds of a compute thread for one step. memory: bytes, with the optimizer's state.

    network: bytes of one step, in and out; 0 through shared memory.
    """

    block: int
    cpu: float
    memory: int = 0
    network: int = 0


@dataclass(frozen=True)
class JobLoad:
    """period: seconds from step to step when the job has `servers` aggregators of its own, its blocks spread evenly.

    That is what losses are relative to: an iteration is compute, then the job's work on its busiest aggregator, which
    begins when all workers have committed and is waited for. loss_limit: None takes that of `Limits`.
    Raises ValueError if the period is shorter than the work in it.
    """

    job: str
    period: float
    blocks: tuple[BlockLoad, ...]
    loss_limit: float | None = None
    servers: int = 1

    def __post_init__(self) -> None:
        if len({load.block for load in self.blocks}) != len(self.blocks) or not self.blocks:
            raise ValueError(f"job {self.job}: blocks must be there and have numbers of their own")
        if self.servers < 1 or self.period <= 0 or any(load.cpu < 0 for load in self.blocks):
            raise ValueError(f"job {self.job}: servers and period must be positive, CPU seconds not negative")
        if self.compute < -1e-9 * self.period:
            raise ValueError(
                f"job {self.job}: {self.cpu:g} s of work on {self.servers} aggregators do not fit its period"
            )

    @property
    def cpu(self) -> float:
        """Seconds of compute thread for one step, all blocks together."""
        return math.fsum(load.cpu for load in self.blocks)

    @property
    def compute(self) -> float:
        """Seconds of an iteration in which the aggregators have nothing of this job to do."""
        return self.period - self.cpu / self.servers


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of one aggregator, beside its one compute thread. memory: bytes. network: bytes/s, in and out together."""

    memory: float = math.inf
    network: float = math.inf


@dataclass(frozen=True, slots=True)
class Limits:
    """What packers may do.

    loss: of a job's speed, (d - D) / d for an iteration of d instead of D seconds.
    utilisation: of a shared aggregator's compute thread (packer `utilisation`).
    headroom: share of the loss limit that a prediction of the packer `utilisation` may use; its formula misses.
    shrink: share of what may be used for a place that may be used for draining an aggregator. Below 1, so that the
        next arrival does not open it again.
    tolerance: an observed loss violates its limit when it is above it by more than this share of it.
    jobs_at_once: how many jobs one call of `rebalance` moves.
    pieces: on how many aggregators the packer `utilisation` spreads a job for the sake of speed.
    shortest_piece: seconds; a job is not spread in pieces of less work, whose messages would cost more.
    chunk: seconds of work after which an aggregator looks for more urgent work.
    jitter: share of its period by which a job's iterations are expected to vary.
    """

    loss: float = 0.1
    utilisation: float = 0.8
    headroom: float = 0.9
    shrink: float = 0.9
    tolerance: float = 0.1
    jobs_at_once: int = 2
    pieces: int = 4
    shortest_piece: float = 1e-3
    chunk: float = 1e-3
    jitter: float = 0.01

    def loss_of(self, job: JobLoad) -> float:
        return self.loss if job.loss_limit is None else job.loss_limit


class DoesNotFit(ValueError):
    """A block is too large for any aggregator: it has to be split."""
