"""Blocks change hands while the job trains (AutoPS, on tensor migration).

The new owner gets memory for them ready first: pages that are mapped, or allocated, only when a step uses them would
hold up that step. Then the old owner announces the new address with its answer to a step, the state travels while the
workers compute, and the new owner applies nothing before it is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.wire.link import FDS_AT_ONCE, Link, Receiver, connect
from computron.parameter_service.wire.messages import Address, Adopt, Adopted, Expect, Expecting, Move, Moved, MovedOut

log = logging.getLogger(__name__)

AT_ONCE = 16 << 20  # bytes of a job that are on their way to another machine
CONNECT = 2.0  # seconds that a connection may take


class Moves:
    """What leaves from here. moved: told of blocks that somebody else has. failed: told of moves that came to nothing.
    The master begins an epoch then, in which all is where it says, and nothing is expected.
    """

    def __init__(
        self,
        machine: str,
        key: str,
        receiver: Receiver,
        pages: Pages,
        moved: Callable[[MovedOut], None],
        failed: Callable[[Job, str], None],
    ) -> None:
        self._machine = machine
        self._key = key
        self._receiver = receiver
        self._moved = moved
        self._failed = failed
        self._links: dict[Address, Link] = {}
        self._locks: defaultdict[Address, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._connecting: set[asyncio.Task[None]] = set()
        self._pages = pages

    def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        for link in self._links.values():
            link.close()

    def order(self, job: Job, move: Move) -> None:
        """Announce the blocks to who is to have them; they leave when it expects them."""
        blocks = [job.blocks[index] for index in move.blocks if index in job.blocks]
        for block in blocks:
            block.moving, block.expected_there = move.to, False
        task = asyncio.ensure_future(self._announce(job, move.to, blocks))
        self._connecting.add(task)
        task.add_done_callback(partial(self._announced, job, move.to))

    def _announced(self, job: Job, to: Address, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._abandon(job, to, f"{to.aggregator} could not be told: {error!r}")

    async def _announce(self, job: Job, to: Address, blocks: Sequence[HeldBlock]) -> None:
        epoch = job.epoch
        try:
            link = await self._link(to)
        except OSError as error:  # TimeoutError is one
            self._abandon(job, to, f"{to.aggregator} cannot be reached: {error or 'it does not answer'}")
            return
        if job.epoch != epoch:
            return
        pushing = job.pushing if link.shares_memory else len(job.members)  # who shares memory here pushes to there
        known = [block for block in blocks if job.blocks.get(block.block.index) is block and block.moving == to]
        for start in range(0, len(known), FDS_AT_ONCE):
            some = known[start : start + FDS_AT_ONCE]
            indices = tuple(block.block.index for block in some)
            expect = Expect(
                self._key, job.spec, job.token, job.epoch, job.members, indices, job.kept, job.history, pushing
            )
            link.send(expect, fds=[block.segment.fd for block in some] if link.shares_memory else ())

    async def _link(self, to: Address) -> Link:
        """One to each address. Raises OSError."""
        async with self._locks[to]:
            link = self._links.get(to)
            if link is None or link.closed:
                async with asyncio.timeout(CONNECT):
                    link = self._links[to] = await connect(to, self._receiver, machine=self._machine)
            return link

    def lost(self, link: Link, jobs: Iterable[Job], reason: str) -> None:
        """What was to go over this link cannot, or may not have come."""
        to = self.address_of(link)
        if to is not None:
            del self._links[to]
            for job in jobs:
                self._abandon(job, to, f"the connection to {to.aggregator} was lost: {reason}")

    def refused(self, job: Job, link: Link, reason: str) -> None:
        """The other aggregator, which was asked from here, will not have them."""
        to = self.address_of(link)
        if to is not None:
            self._abandon(job, to, f"{to.aggregator} refused: {reason}")

    def _abandon(self, job: Job, to: Address, reason: str) -> None:
        """What has not left stays here, and what has left is kept until the next epoch says whose it is."""
        staying = [block for block in job.blocks.values() if block.moving == to]
        for block in staying:
            block.moving, block.expected_there = None, False
        if staying or any(job.given[index][1] == to for index in job.leaving):
            self._failed(job, reason)

    def expected(self, job: Job, link: Link, message: Expecting) -> None:
        """The other aggregator knows what is to come."""
        to = self.address_of(link)
        if message.epoch != job.epoch or to is None:
            return
        for index in message.blocks:
            block = job.blocks.get(index)
            if block is not None and block.moving == to:
                block.expected_there = True
        self.go_on(job, list(job.blocks.values()))

    def go_on(self, job: Job, blocks: Sequence[HeldBlock]) -> None:
        """Send away what may leave now. What travels as bytes goes little by little: when a worker wants the next step,
        no more is on its way than it can wait for, and the rest follows after that step.
        """
        leaving: dict[Address, list[HeldBlock]] = {}
        on_its_way = sum(block.segment.nbytes for block in job.leaving.values())
        for block in blocks:
            if block.moving is None or not block.expected_there or not job.free_to_move(block):
                continue
            link = self._links.get(block.moving)
            if link is None:
                continue  # another is being made
            if not link.shares_memory:
                if on_its_way and on_its_way + block.segment.nbytes > AT_ONCE:
                    continue
                on_its_way += block.segment.nbytes
            leaving.setdefault(block.moving, []).append(block)
        for to, those in leaving.items():
            self._send(job, to, those)

    def _send(self, job: Job, to: Address, blocks: Sequence[HeldBlock]) -> None:
        link = self._links[to]
        name = job.spec.job
        steps: dict[int, list[int]] = {}
        for block in blocks:
            steps.setdefault(block.applied, []).append(block.block.index)
        for step, indices in steps.items():
            for worker in job.workers.values():
                worker.link.send(Moved(name, job.epoch, step, tuple(indices), to))
        for block in blocks:
            index = block.block.index
            job.leaving[index] = job.blocks.pop(index)
            job.given[index] = block.applied, to
            adopt = Adopt(name, job.epoch, index, block.applied, block.updates, block.memory, job.kept)
            if link.shares_memory:
                link.send(adopt)
            else:
                link.send(adopt, payload=block.segment.view())
                job.counters.network += block.segment.nbytes

    def adopted(self, job: Job, link: Link, message: Adopted) -> None:
        """It has left for good. Also when an epoch has begun meanwhile: it was said to be here, and is not any more."""
        to = self.address_of(link)
        if to is None or message.block not in job.leaving or job.given[message.block][1] != to:
            return
        if message.epoch != job.epoch and not job.held:
            return
        block = job.leaving.pop(message.block)
        self._pages.release(block.close)
        for worker in job.workers.values():
            worker.staging.forget(message.block)
        if message.epoch != job.epoch:
            return
        self._moved(MovedOut(job.spec.job, job.epoch, (message.block,), to.aggregator, block.applied))
        if not link.shares_memory:
            self.go_on(job, [block for block in job.blocks.values() if block.moving is not None])

    def address_of(self, link: Link) -> Address | None:
        """Of a connection that was made from here."""
        return next((to for to, known in self._links.items() if known is link), None)
