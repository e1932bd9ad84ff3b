"""The memory that an aggregator may use, and what jobs take of it: blocks, and gradients that are pushed for them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.specs import block_bytes
from computron.parameter_service.wire.segments import Segment


class NoRoom(Exception):
    """The aggregator may not use so much memory."""


class Room:
    """jobs: all that are here, by name. limit: bytes."""

    def __init__(self, jobs: Mapping[str, Job], limit: int) -> None:
        self._jobs = jobs
        self._limit = limit

    @property
    def used(self) -> int:
        """Bytes, those included that are expected or may be pushed."""
        return sum(map(_used_by, self._jobs.values()))

    def check_blocks(
        self, job: Job, blocks: Collection[int], *, instead: Collection[int] = (), pushing: int = 0
    ) -> None:
        """These are to come. instead: these go before. pushing: so many members will push their gradients, if more do
        than now. Raises NoRoom.
        """
        most = max(pushing, job.pushing)
        freed = job.state_bytes(instead) + job.pushing * job.gradient_bytes(instead)
        self._check(job.state_bytes(blocks) + most * job.gradient_bytes(blocks) - freed)

    def check_gradients(self, job: Job) -> None:
        """One member more is to push them. Raises NoRoom."""
        self._check(job.gradient_bytes(_blocks_of(job)))

    def _check(self, nbytes: int) -> None:
        used = self.used
        if used + nbytes > self._limit:
            raise NoRoom(f"{nbytes} bytes more than the {used} in use exceed the {self._limit} that it may use")


def make_room(job: Job, blocks: Sequence[int], fds: Sequence[int]) -> None:
    """Memory for blocks that are to come: of these descriptors, or new. Raises OSError, ValueError."""
    mapped = dict(zip(blocks, fds, strict=True)) if fds else {}
    for index in blocks:
        if index not in job.expected:
            continue
        if (before := job.arriving.pop(index, None)) is not None:
            before.close()
        nbytes = block_bytes(job.spec, job.layout.blocks[index])
        if mapped:
            job.arriving[index] = Segment(os.dup(mapped[index]), nbytes)
        else:
            job.arriving[index] = Segment.create(f"computron:{job.spec.job}:{index}", nbytes)


def _used_by(job: Job) -> int:
    here = sum(block.segment.nbytes for block in (*job.blocks.values(), *job.leaving.values()))
    return here + job.state_bytes(job.expected) + job.pushing * job.gradient_bytes(_blocks_of(job))


def _blocks_of(job: Job) -> set[int]:
    return {*job.blocks, *job.leaving, *job.expected}
