"""Blocks change hands while the job trains (AutoPS, on tensor migration).

The new owner gets memory for them ready first: pages that are mapped, or allocated, only when a step uses them would
hold up that step. Then the old owner announces the new address with its answer to a step, the state travels while the
workers compute, and the new owner applies nothing before it is there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.wire.link import FDS_AT_ONCE, Link, Receiver, connect
from computron.parameter_service.wire.messages import Address, Adopt, Adopted, Expect, Expecting, Move, Moved, MovedOut
from computron.parameter_service.wire.segments import Segment

log = logging.getLogger(__name__)

LEAST_PRIORITY = 19
REST = 3.0  # times as long as it has worked
AT_ONCE = 16 << 20  # bytes of a job that are on their way to another machine


class Moves:
    """What leaves from here, and memory for what comes. moved: told of blocks that somebody else has. failed: of moves
    that came to nothing.
    """

    def __init__(
        self,
        machine: str,
        key: str,
        receiver: Receiver,
        moved: Callable[[MovedOut], None],
        failed: Callable[[Job, str], None],
    ) -> None:
        self._machine = machine
        self._key = key
        self._receiver = receiver
        self._moved = moved
        self._failed = failed
        self._links: dict[str, Link] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._pages = ThreadPoolExecutor(1, "pages", initializer=_give_way)

    def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        for link in self._links.values():
            link.close()
        self._pages.shutdown(cancel_futures=True)

    def touch(self, segments: Sequence[Segment], then: Callable[[], None]) -> None:
        """Have all their pages mapped in another thread; `then` is called when they are."""
        loop = asyncio.get_running_loop()
        for segment in segments:
            self._pages.submit(_and_rest, segment.touch)
        self._pages.submit(lambda: loop.call_soon_threadsafe(then))

    def order(self, job: Job, move: Move) -> None:
        """Announce the blocks to who is to have them; they leave when it expects them."""
        blocks = [job.blocks[index] for index in move.blocks if index in job.blocks]
        for block in blocks:
            block.moving = move.to
        task = asyncio.ensure_future(self._announce(job, move.to, blocks))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _announce(self, job: Job, to: Address, blocks: Sequence[HeldBlock]) -> None:
        link = self._links.get(to.aggregator)
        if link is None or link.closed:
            try:
                link = await connect(to, self._receiver, machine=self._machine)
            except OSError as error:
                self.abandon(job, to.aggregator, f"{to.aggregator} cannot be reached: {error}")
                return
            self._links[to.aggregator] = link
        for start in range(0, len(blocks), FDS_AT_ONCE):
            some = [
                block for block in blocks[start : start + FDS_AT_ONCE] if job.blocks.get(block.block.index) is block
            ]
            indices = tuple(block.block.index for block in some)
            expect = Expect(self._key, job.spec, job.token, job.epoch, job.members, indices, job.kept)
            link.send(expect, fds=[block.segment.fd for block in some] if link.shares_memory else ())

    def abandon(self, job: Job, to: str, reason: str) -> None:
        """What has not left stays here."""
        for block in job.blocks.values():
            if block.moving is not None and block.moving.aggregator == to:
                block.moving = None
                block.expected_there = False
        self._failed(job, reason)

    def expected(self, job: Job, link: Link, message: Expecting) -> None:
        """The other aggregator knows what is to come."""
        if message.epoch != job.epoch:
            return
        for index in message.blocks:
            block = job.blocks.get(index)
            if block is not None and block.moving is not None:
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
            if not self._links[block.moving.aggregator].shares_memory:
                if on_its_way and on_its_way + block.segment.nbytes > AT_ONCE:
                    continue
                on_its_way += block.segment.nbytes
            leaving.setdefault(block.moving, []).append(block)
        for to, those in leaving.items():
            self._send(job, to, those)

    def _send(self, job: Job, to: Address, blocks: Sequence[HeldBlock]) -> None:
        link = self._links[to.aggregator]
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
            adopt = Adopt(name, job.epoch, index, block.applied, block.updates, block.memory)
            if link.shares_memory:
                link.send(adopt)
            else:
                link.send(adopt, payload=block.segment.view())
                job.counters.network += block.segment.nbytes

    def adopted(self, job: Job, to: str, message: Adopted) -> None:
        """It has left for good."""
        block = job.leaving.pop(message.block, None)
        if block is None or message.epoch != job.epoch:
            return
        self._pages.submit(_and_rest, block.close)  # with the last reference: its pages are given back there, too
        for worker in job.workers.values():
            worker.staging.forget(message.block)
        self._moved(MovedOut(job.spec.job, job.epoch, (message.block,), to, block.applied))
        link = self._links.get(to)
        if link is not None and not link.shares_memory:
            self.go_on(job, [block for block in job.blocks.values() if block.moving is not None])

    def aggregator_of(self, link: Link) -> str | None:
        return next((name for name, known in self._links.items() if known is link), None)


def _give_way() -> None:
    """This thread takes only what cores the others leave."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)


def _and_rest(work: Callable[[], None]) -> None:
    """What is computed meanwhile needs the same memory: it gets most of the time."""
    began = time.monotonic()
    work()
    time.sleep(REST * (time.monotonic() - began))
