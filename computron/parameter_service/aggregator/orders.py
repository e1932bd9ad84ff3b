"""What the master orders: which blocks are here, from which epoch on, and with which members."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.job import Job, Worker, versions_of
from computron.parameter_service.aggregator.moves import Moves
from computron.parameter_service.aggregator.room import NoRoom, Room
from computron.parameter_service.aggregator.saving import Saver
from computron.parameter_service.aggregator.staging import missing
from computron.parameter_service.aggregator.steps import Steps
from computron.parameter_service.specs import layout_of
from computron.parameter_service.wire.messages import (
    FRESH,
    KEEP,
    Adopt,
    BlockState,
    Complete,
    Drop,
    Expect,
    Failed,
    Held,
    Hold,
    Host,
    Keep,
    Kept,
    Move,
    Ready,
)
from computron.parameter_service.wire.segments import Segment

log = logging.getLogger(__name__)


class Orders:
    """jobs: all that are here, by name. report: sends to the master. arrived: told of a job's blocks that are complete
    now and may be joined. leave: ends the connection of a worker that is none of a job's any more.
    """

    def __init__(
        self,
        jobs: dict[str, Job],
        memory: int,
        steps: Steps,
        moves: Moves,
        saver: Saver,
        report: Callable[[Any], None],
        arrived: Callable[[Job, Sequence[HeldBlock]], None],
        leave: Callable[[Worker], None],
    ) -> None:
        self._jobs = jobs
        self.room = Room(jobs, memory)
        self._steps = steps
        self._moves = moves
        self._saver = saver
        self._report = report
        self._arrived = arrived
        self._leave = leave

    def hold(self, order: Hold) -> None:
        job = self._jobs.get(order.job)
        if job is None:
            self._report(Held(order.job, order.epoch, (), ()))
            return
        if order.epoch < job.epoch:
            return
        job.epoch, job.held = order.epoch, True

        def quiet() -> None:
            if job.epoch == order.epoch:
                blocks = {**job.leaving, **job.blocks}.values()
                states = tuple(BlockState(b.block.index, b.applied) for b in blocks if b.complete)
                empty = tuple(b.block.index for b in blocks if not b.complete)
                leaving = tuple(job.leaving)
                self._report(Held(order.job, order.epoch, states, job.lately(), leaving, empty, job.history))

        self._steps.quiet(job, quiet)

    def complete(self, order: Complete) -> None:
        job = self._jobs.get(order.job)
        if job is None or order.epoch != job.epoch:
            return
        try:
            self._take_back(job, order.blocks)
        except OSError as error:
            self._failed(order.job, order.epoch, "complete", str(error))
            return
        blocks = [job.blocks[index] for index in order.blocks if index in job.blocks]
        wrong = [b.block.index for b in blocks if not b.complete or b.applied != order.step - 1]
        unstaged = _without_gradients(job, blocks, order)
        if len(blocks) < len(order.blocks) or wrong or unstaged:
            what = f"of workers {unstaged} there are no gradients" if unstaged else f"blocks {wrong} are not there"
            self._failed(order.job, order.epoch, "complete", f"step {order.step}: {what}")
            return

        def done() -> None:
            if job.epoch != order.epoch:
                return  # it was withdrawn, or is of no use any more
            lacking = [b.block.index for b in blocks if not b.complete or b.applied != order.step]
            if lacking:
                self._failed(order.job, order.epoch, "complete", f"blocks {lacking} could not be computed")
            else:
                for version in versions_of(order.commits):
                    self._saver.save(job, blocks, order.step, version)
                self._ready(job, order.epoch, blocks)

        self._steps.complete(job, blocks, order.commits, done)

    def host(self, order: Host) -> None:
        job = self._jobs.get(order.spec.job)
        if job is not None and order.epoch < job.epoch:
            return
        try:
            job = job or new_job(order)
            self._enter(job, order)
            self._jobs[order.spec.job] = job
        except (NoRoom, OSError, ValueError) as error:
            self._failed(order.spec.job, order.epoch, "host", str(error))

    def move(self, order: Move) -> None:
        job = self._jobs.get(order.job)
        if job is None or order.epoch != job.epoch or job.held:
            self._failed(order.job, order.epoch, "move", "the job is in another epoch")
            return
        self._moves.order(job, order)

    def keep(self, order: Keep) -> None:
        job = self._jobs.get(order.job)
        if job is None or order.epoch != job.epoch or job.held:
            return
        blocks = [block for block in job.blocks.values() if block.complete and not block.scheduled]
        for step in {block.applied for block in blocks}:
            self._saver.save(job, [block for block in blocks if block.applied == step], step)

    def drop(self, order: Drop) -> None:
        job = self._jobs.pop(order.job, None)
        if job is not None:
            job.held = True
            if job.blocks or job.leaving:  # else it has moved away, and files get what was copied for them before
                self._saver.cancel(job, versions=True)
            self._saver.left(order.job)
            self._steps.quiet(job, lambda: self._forget(job))

    def kept(self, order: Kept) -> list[Job]:
        """The job, if it is here: others of its steps may be applied now."""
        job = self._jobs.get(order.job)
        if job is None:
            return []
        job.master_away = False
        if order.step is None:
            job.kept = None
        else:
            job.kept = order.step if job.kept is None else max(job.kept, order.step)
            job.trouble = ""
        return [job]

    def expect(self, message: Expect) -> Job:
        """Blocks will be handed over to here. Raises NoRoom or ValueError."""
        job = self._jobs.get(message.spec.job)
        here = job is not None and (job.blocks or job.leaving)
        if job is not None and (message.epoch < job.epoch or (here and message.epoch > job.epoch)):
            raise ValueError(f"the job is in epoch {job.epoch}, not {message.epoch}")
        if job is None:
            job = new_job(message)
        if message.epoch > job.epoch:
            job.epoch, job.members = message.epoch, message.members
            job.kept, job.history = message.kept, message.history
            job.commits.clear()
            job.forget_asks()
            job.given.clear()
            job.expect_nothing()
        blocks = {index for index in message.blocks if index not in job.blocks}
        self.room.check_blocks(job, blocks - job.expected, pushing=message.pushing)
        job.expected |= blocks
        self._jobs[message.spec.job] = job
        return job

    def adopt(self, job: Job, message: Adopt, segment: Segment, memory: str) -> None:
        block = HeldBlock.of(job.spec, job.layout.blocks[message.block], segment, memory)
        block.applied, block.updates, block.complete = message.applied, message.updates, True
        job.blocks[message.block] = block
        if job.kept is not None:  # what was told of it before it was known here has been missed
            job.kept = None if message.kept is None else max(job.kept, message.kept)
        job.expected.discard(message.block)
        job.given.pop(message.block, None)
        self._arrived(job, [block])

    def written(self, job: Job, block: HeldBlock) -> None:
        """A worker has brought the block's state."""
        block.complete = True
        self._arrived(job, [block])
        self._ready(job, job.epoch, [block])
        if job.spec.snapshot_every:
            self._saver.save(job, [block], block.applied)

    def _enter(self, job: Job, order: Host) -> None:
        """Be what the order says, as soon as nothing of the job is computed any more."""
        here = {*job.blocks, *job.leaving}
        missing = [index for index in order.blocks if index not in here]
        if order.source == KEEP and missing:
            raise ValueError(f"blocks {missing} are not here to be kept")
        job.expect_nothing()
        self.room.check_blocks(job, missing, instead=here.difference(order.blocks))
        job.epoch, job.members, job.held, job.token = order.epoch, order.members, True, order.token
        job.kept, job.master_away = order.kept, False
        if order.kept is not None:
            job.trouble = ""
        self._saver.cancel(job, versions=order.source != KEEP)
        self._steps.quiet(job, lambda: self._entered(job, order) if job.epoch == order.epoch else None)

    def _entered(self, job: Job, order: Host) -> None:
        try:
            self._take_back(job, order.blocks)
        except OSError as error:
            self._failed(order.spec.job, order.epoch, "host", str(error))
            return
        known = {**job.leaving, **job.blocks}
        job.blocks, job.leaving, job.given = {}, {}, {}
        job.commits.clear()
        job.forget_asks()
        job.history = max(job.history, order.history) if order.source == KEEP else order.epoch
        for index in known.keys() - set(order.blocks):  # others may come into their room
            known.pop(index).close()
        try:
            for index in order.blocks:
                block = known.pop(index, None) or HeldBlock.create(job.spec, job.layout.blocks[index])
                block.moving, block.expected_there = None, False
                job.blocks[index] = block
        except OSError as error:
            self._failed(order.spec.job, order.epoch, "host", str(error))
            return
        for rank in [rank for rank in job.workers if rank not in job.members]:
            self._leave(job.workers.pop(rank))
        blocks = list(job.blocks.values())
        if order.source == KEEP:
            wrong = [b.block.index for b in blocks if not b.complete or b.applied != order.applied]
            if wrong:
                self._failed(order.spec.job, order.epoch, "host", f"blocks {wrong} are not at {order.applied}")
                return
            self._go(job, order, blocks)
            return
        for block in blocks:
            block.complete, block.saved = False, -math.inf
        if order.source == FRESH:
            for block in blocks:
                block.applied = order.applied
            job.held = False
            self._ready(job, order.epoch, ())
        else:
            self._saver.restore(job, blocks, Path(order.source), lambda: self._go(job, order, blocks))

    def _take_back(self, job: Job, blocks: Sequence[int]) -> None:
        """Have again what was on its way to somebody. That one may still write to the memory that went with it: these
        get memory of their own. Raises OSError.
        """
        for index in blocks:
            if index in job.leaving:
                job.blocks[index] = job.leaving[index].copied(job.spec)
                job.leaving.pop(index).close()

    def _go(self, job: Job, order: Host, blocks: list[HeldBlock]) -> None:
        if job.epoch != order.epoch:
            return
        for block in blocks:
            block.applied, block.complete = order.applied, True
        job.held = False
        self._ready(job, order.epoch, blocks)
        if job.spec.snapshot_every and (job.kept is None or order.applied > job.kept):
            self._saver.save(job, blocks, order.applied)  # what was being saved in the last epoch will not be complete
        self._arrived(job, blocks)

    def _failed(self, job: str, epoch: int, order: str, reason: str) -> None:
        log.warning("job %s: %s: %s", job, order, reason)
        self._report(Failed(job, epoch, order, reason))

    def _ready(self, job: Job, epoch: int, blocks: Sequence[HeldBlock]) -> None:
        self._report(Ready(job.spec.job, epoch, tuple(BlockState(b.block.index, b.applied) for b in blocks)))

    def _forget(self, job: Job) -> None:
        job.expect_nothing()
        self._steps.compute.behind(job)  # nothing of it is left there
        for block in (*job.blocks.values(), *job.leaving.values()):
            block.close()
        for worker in job.workers.values():
            self._leave(worker)


def _without_gradients(job: Job, blocks: Sequence[HeldBlock], order: Complete) -> list[int]:
    """Ranks that committed the step elsewhere, and of which not all gradients that it takes here are here."""
    ranks = [commit.rank for commit in order.commits]
    gone = [rank for rank in ranks if rank not in job.workers]
    if gone or any(commit.skip for commit in order.commits):
        return gone
    stagings = {rank: job.workers[rank].staging for rank in ranks}
    return sorted({rank for block in blocks for rank in missing(stagings, block.block, order.step)})


def new_job(order: Host | Expect) -> Job:
    """Raises ValueError if there can be no such job."""
    job = Job(order.spec, order.token, order.epoch, order.members, layout_of(order.spec), kept=order.kept)
    if isinstance(order, Expect):
        job.history = order.history
    return job
