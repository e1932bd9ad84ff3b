"""From commits to applied steps: schedules blocks, computes them, and tells the workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch

from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.compute import FIRST, ComputeThread, Work
from computron.parameter_service.aggregator.job import Job, Worker
from computron.parameter_service.aggregator.kernels import Summer
from computron.parameter_service.aggregator.staging import as_bytes
from computron.parameter_service.packing.loads import LEAST_ALLOWANCE
from computron.parameter_service.specs import PARAMETERS
from computron.parameter_service.wire.messages import Applied, AskNorms, HeldCommit, Norms, Parameters, Refused
from computron.parameter_service.wire.refusals import FAILED

log = logging.getLogger(__name__)


class Steps:
    """changed: told of a job's blocks that have just seen a step, after the workers have been. failed: of jobs with
    which something went wrong that nobody foresaw.
    """

    def __init__(
        self,
        changed: Callable[[Job, list[HeldBlock], int, Sequence[HeldCommit]], None],
        failed: Callable[[Job, str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._failed = failed
        self._summer = Summer()
        self._fresh: defaultdict[tuple[Job, int], list[HeldBlock]] = defaultdict(list)
        self._by: dict[tuple[Job, int], Sequence[HeldCommit]] = {}
        self.compute = ComputeThread(self._deliver)
        self.compute.start()

    def close(self) -> None:
        self.compute.stop()

    def schedule(self, job: Job, blocks: Sequence[HeldBlock]) -> None:
        """Apply to these blocks the next step, which all members have committed."""
        if blocks:
            self._submit(job, blocks, [job.commits[rank].said for rank in job.members], self._one_applied)

    def complete(
        self, job: Job, blocks: Sequence[HeldBlock], commits: Sequence[HeldCommit], done: Callable[[], None]
    ) -> None:
        """Apply what `commits` say to these blocks, and call `done` when all have seen it."""
        left = len(blocks)

        def one_done(block: HeldBlock, commits: Sequence[HeldCommit], work: Work) -> None:
            nonlocal left
            self._close_step(job, work, block)
            left -= 1
            if not left:
                done()

        self._submit(job, blocks, sorted(commits, key=lambda commit: commit.rank), one_done)

    def norms(self, job: Job, asks: Sequence[AskNorms]) -> None:
        """Tell the workers the squared norms of what their gradients add up to."""
        step, scales = asks[0].step, [ask.scale for ask in asks]
        found: list[tuple[int, float]] = []
        blocks = list(job.blocks.values())
        stagings = [job.workers[rank].staging for rank in job.members]

        def of(block: HeldBlock) -> None:
            gradients = [staging.gradient(block.block) for staging in stagings]
            total = self._summer.sum(gradients, scales, average=job.spec.average)
            found.append((block.block.index, float(torch.linalg.vector_norm(total, dtype=torch.float64)) ** 2))

        def done(block: HeldBlock, work: Work) -> None:
            if work.error is not None:
                self._refuse(job, step, f"the norms of its gradients could not be computed: {work.error!r}")
            elif len(found) == len(blocks) and not work.withdrawn:
                for worker in job.workers.values():
                    worker.link.send(Norms(job.spec.job, step, tuple(sorted(found)), asks[0].time))
                found.clear()

        self._queue(job, blocks, of, done)

    def quiet(self, job: Job, then: Callable[[], None]) -> None:
        """Take back what is scheduled of the job, and call `then` when nothing of it is computed any more."""
        for work in self.compute.withdraw(job):
            self._guarded(job, partial(work.done, work))
        self.compute.submit(Work(job, FIRST, LEAST_ALLOWANCE, 0.0, _nothing, lambda work: then()))

    def tell(self, job: Job, worker: Worker, block: HeldBlock, *, skipped: bool = False) -> None:
        """That the block has seen its last step."""
        name = job.spec.job
        if worker.link.shares_memory:
            worker.link.send(Applied(name, block.applied, (block.block.index,), skipped))
            return
        view = as_bytes(block.parts[PARAMETERS])
        worker.link.send(Parameters(name, block.applied, block.block.index, skipped), payload=view)
        job.counters.network += view.nbytes

    def _submit(
        self,
        job: Job,
        blocks: Sequence[HeldBlock],
        commits: Sequence[HeldCommit],
        done: Callable[[HeldBlock, Sequence[HeldCommit], Work], None],
    ) -> None:
        stagings = [job.workers[commit.rank].staging for commit in commits]
        scales = [commit.scale for commit in commits]
        skip = any(commit.skip for commit in commits)
        groups = commits[0].groups

        def apply(block: HeldBlock) -> None:
            if skip:
                return
            with block.lock:
                for wanted in block.wanted:
                    wanted.take(block)
                gradients = [staging.gradient(block.block) for staging in stagings]
                total = self._summer.sum(gradients, scales, average=job.spec.average)
                block.kernel.apply(total, groups[block.block.group], block.updates + 1)
                block.updates += 1

        for block in blocks:
            block.scheduled = block.applied + 1
        self._queue(job, blocks, apply, lambda block, work: done(block, commits, work))

    def _queue(
        self,
        job: Job,
        blocks: Sequence[HeldBlock],
        run: Callable[[HeldBlock], None],
        done: Callable[[HeldBlock, Work], None],
    ) -> None:
        expected = [job.lasts(block.block.index) for block in blocks]
        allowance = job.allowance()
        deadline = time.monotonic() + sum(expected) + allowance
        self.compute.submit(
            *(
                Work(job, deadline, allowance, seconds, partial(run, block), partial(done, block))
                for block, seconds in zip(blocks, expected, strict=True)
            )
        )

    def _close_step(self, job: Job, work: Work, block: HeldBlock) -> bool:
        """True if the block has seen the step."""
        step, block.scheduled = block.scheduled, 0
        if work.withdrawn:
            return False
        if work.error is not None:
            block.complete = False  # it may be half changed
            log.error("job %s, block %d, step %d: %r", job.spec.job, block.block.index, step, work.error)
            self._refuse(job, step, f"block {block.block.index} could not be computed: {work.error!r}")
            return False
        block.applied = step
        job.note_seconds(block.block.index, work.seconds, work.lasted)
        job.counters.late += max(0.0, work.finished - work.deadline)
        return True

    def _one_applied(self, block: HeldBlock, commits: Sequence[HeldCommit], work: Work) -> None:
        job = work.owner
        assert isinstance(job, Job)
        if self._close_step(job, work, block):
            self._fresh[job, block.applied].append(block)
            self._by[job, block.applied] = commits

    def _refuse(self, job: Job, step: int, message: str) -> None:
        for worker in job.workers.values():
            worker.link.send(Refused(job.spec.job, FAILED, message, step))

    def _deliver(self, works: list[Work]) -> None:
        self._loop.call_soon_threadsafe(self._tell, works)

    def _tell(self, works: list[Work]) -> None:
        for work in works:
            assert isinstance(work.owner, Job)
            self._guarded(work.owner, partial(work.done, work))
        while self._fresh:
            (job, step), blocks = self._fresh.popitem()
            self._guarded(job, partial(self._tell_applied, job, step, blocks, self._by.pop((job, step))))

    def _tell_applied(self, job: Job, step: int, blocks: list[HeldBlock], commits: Sequence[HeldCommit]) -> None:
        skipped = any(commit.skip for commit in commits)
        indices = tuple(block.block.index for block in blocks)
        for worker in job.workers.values():
            if worker.link.shares_memory:
                worker.link.send(Applied(job.spec.job, step, indices, skipped))
                continue
            for block in blocks:
                self.tell(job, worker, block, skipped=skipped)
        self._changed(job, blocks, step, commits)

    def _guarded(self, job: Job, tell: Callable[[], None]) -> None:
        """What goes wrong with one job does not keep the others from hearing of theirs."""
        try:
            tell()
        except Exception as error:
            log.exception("job %s: what was computed could not be told", job.spec.job)
            self._failed(job, f"what was computed could not be told: {error!r}")


def _nothing() -> None: ...
