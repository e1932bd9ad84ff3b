"""Blocks go from one aggregator to another while their job trains."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable

from computron.parameter_service.master.files import newest
from computron.parameter_service.master.records import MoveBegun, MoveEnded
from computron.parameter_service.master.state import Job, State
from computron.parameter_service.wire.messages import Failed, Kept, Move, MovedOut

log = logging.getLogger(__name__)


class Moves:
    def __init__(self, state: State) -> None:
        self._state = state

    def order(self, job: Job, blocks: Iterable[int], to: str, now: float) -> int:
        """How many were ordered: those that are elsewhere and are not on their way already."""
        target = self._state.aggregators.get(to)
        placed = job.book.placed
        if job.change is not None or placed is None or placed.epoch != job.book.epoch or job.failed is not None:
            return 0
        if target is None or target.address is None or target.link is None or now < job.still_until:
            return 0
        by_owner: dict[str, list[int]] = defaultdict(list)
        for block in blocks:
            owner = placed.owners[block]
            if owner != to and block not in job.book.moving and self._state.is_linked(owner):
                by_owner[owner].append(block)
        for owner, moved in sorted(by_owner.items()):
            self._state.write(MoveBegun(job.name, tuple(moved), to))
            self._state.tell(owner, Move(job.name, placed.epoch, tuple(moved), target.address))
        return sum(map(len, by_owner.values()))

    def moved_out(self, aggregator: str, message: MovedOut, now: float) -> None:
        job = self._state.jobs.get(message.job)
        if job is None or message.epoch != job.book.epoch or job.change is not None:
            return
        owners = job.book.owners
        blocks = tuple(block for block in message.blocks if 0 <= block < len(owners) and owners[block] == aggregator)
        if not blocks:
            return
        known = message.to in owners
        self._state.write(MoveEnded(job.name, blocks, message.to))
        snapshot = newest(job)
        if not known and snapshot is not None:  # what was told of it before may have come before the job did
            self._state.tell(message.to, Kept(job.name, None if job.trouble else snapshot.step))
        self._state.migrations += len(blocks)
        job.saw(message.applied, now)

    def failed(self, job: Job, aggregator: str, message: Failed, now: float) -> None:
        """What this aggregator was to move stays, for a while at least. Whoever was to have it may have some of it, and
        a block may be on its way for ever: a new epoch says where all are.
        """
        log.warning(
            "order_failed job=%s aggregator=%s order=%s reason=%s",
            job.name, aggregator, message.order, message.message,
        )  # fmt: skip
        if message.epoch != job.book.epoch or job.change is not None:
            return
        job.broken = f"{aggregator} failed: {message.message}"
        moving = job.book.moving
        ours = tuple(sorted(block for block in moving if job.book.owners[block] == aggregator))
        if ours:
            job.hosts.update(moving[block] for block in ours)
            job.still_until = now + self._state.limits.still
            self._state.write(MoveEnded(job.name, ours, aggregator))
