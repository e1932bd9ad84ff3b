"""Takes what workers and other aggregators send, and answers."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from torch import Tensor

from computron.parameter_service.aggregator.arrivals import Arrivals
from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.checks import (
    Refusal,
    Repeated,
    check_epoch,
    check_version,
    extra_bytes,
    known_job,
    needs_payload,
    part_of,
)
from computron.parameter_service.aggregator.job import Job, Worker
from computron.parameter_service.aggregator.moves import Moves
from computron.parameter_service.aggregator.orders import Orders
from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.aggregator.room import NoRoom
from computron.parameter_service.aggregator.saving import Saver
from computron.parameter_service.aggregator.staging import PushedStaging, SharedStaging, Staging, as_bytes, missing
from computron.parameter_service.aggregator.steps import Steps
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.link import FDS_AT_ONCE, Link
from computron.parameter_service.wire.messages import (
    Adopt,
    Adopted,
    AskNorms,
    Commit,
    Contents,
    Expect,
    Expecting,
    Extra,
    ExtraTaken,
    Flush,
    Hosted,
    Join,
    Joined,
    Moved,
    Push,
    Pushed,
    Read,
    Refused,
    WorkerLost,
    Write,
    Written,
)

log = logging.getLogger(__name__)


class Server:
    """Receiver of all links. jobs: all that are here, by name. report: sends to the master."""

    def __init__(self, jobs: dict[str, Job], report: Callable[[Any], None]) -> None:
        self._jobs = jobs
        self._report = report
        self._workers: dict[Link, tuple[Job, Worker]] = {}
        self._incoming: dict[Link, bytearray] = {}
        self._dropped: dict[Link, Any] = {}  # messages that were of no use before their payload had come
        self._directed: dict[Link, Any] = {}  # messages whose payloads have a place
        self.steps: Steps
        self.pages: Pages
        self.moves: Moves
        self.saver: Saver
        self.orders: Orders
        self.arrivals: Arrivals

    # What links tell.

    def destination(self, link: Link, message: Any, size: int) -> memoryview | None:
        try:
            view = self._destination(link, message, size)
            if len(view) != size:
                raise Refusal(refusals.BAD_MESSAGE, f"{size} bytes where {len(view)} belong")
        except Repeated:
            self._dropped[link] = message
            return None
        except Refusal as refusal:
            self._dropped[link] = message
            self._refuse(link, message, refusal)
            return None
        self._directed[link] = message
        return view

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        try:
            if self._dropped.get(link) is message:
                del self._dropped[link]
            else:
                self._received(link, message, fds)
        except Refusal as refusal:
            self._refuse(link, message, refusal)
        finally:
            self._directed.pop(link, None)
            for fd in fds:
                os.close(fd)

    def lost(self, link: Link, reason: str) -> None:
        job, worker = self._forget(link)
        if job is not None and worker is not None and job.workers.get(worker.rank) is worker:
            self._report(WorkerLost(job.spec.job, worker.rank, worker.incarnation))
        self.moves.lost(link, self._jobs.values(), reason)

    def leave(self, worker: Worker) -> None:
        """It is none of a job's any more: its connection ends, and nothing keeps what the job had."""
        self._forget(worker.link)
        worker.link.close()

    def _forget(self, link: Link) -> tuple[Job, Worker] | tuple[None, None]:
        self._incoming.pop(link, None)
        self._directed.pop(link, None)
        self._dropped.pop(link, None)
        self.arrivals.lost(link)
        return self._workers.pop(link, (None, None))

    # What others of this aggregator tell.

    def arrived(self, job: Job, blocks: Sequence[HeldBlock]) -> None:
        """These blocks are complete now: workers may map them, and what they committed meanwhile is applied."""
        for worker in job.workers.values():
            self._joined(job, worker, blocks)
        self.pages.enlarge([block.segment for block in blocks])
        self.go_on(job, [block.block.index for block in blocks])

    def go_on(self, job: Job, blocks: Sequence[int]) -> None:
        """Do what can be done with these blocks now."""
        self.steps.schedule(job, job.ready(blocks))
        self.moves.go_on(job, [job.blocks[index] for index in blocks if index in job.blocks])
        asks = job.asked_norms()
        if asks:
            job.unanswered.clear()
            self.steps.norms(job, asks)

    # What messages ask for.

    def _destination(self, link: Link, message: Any, size: int) -> memoryview:
        match message:
            case Push():
                job, worker = self._worker(link, message.epoch)
                block = self._block(job, message.block)
                said = job.commits.get(worker.rank)
                if isinstance(worker.staging, SharedStaging):
                    raise Refusal(refusals.BAD_MESSAGE, "who shares memory pushes nothing")
                if said is not None and (said.said.step > message.step or said.covers(block, message.step)):
                    raise Repeated
                return worker.staging.destination(job.layout.blocks[block])
            case Write():
                _, _, part = self._to_write(link, message)
                return self._kept(link, size, part.nbytes)
            case Adopt():
                return self.arrivals.room(link, message)
            case Extra():
                job, _ = self._worker(link, message.epoch)
                return self._kept(link, size, extra_bytes(job, message))
        raise Refusal(refusals.BAD_MESSAGE, f"a payload that {type(message).__name__} does not have")

    def _kept(self, link: Link, size: int, nbytes: int) -> memoryview:
        """Memory in which a payload of `nbytes` is kept until it is used."""
        if size != nbytes:
            raise Refusal(refusals.BAD_MESSAGE, f"{size} bytes where {nbytes} belong")
        try:
            buffer = self._incoming[link] = bytearray(size)
        except MemoryError as error:
            raise Refusal(refusals.QUOTA, f"there is no memory for {size} bytes") from error
        return memoryview(buffer)

    def _received(self, link: Link, message: Any, fds: list[int]) -> None:
        directed = self._directed.pop(link, None) is message
        if not directed and needs_payload(link, message):
            raise Refusal(refusals.BAD_MESSAGE, f"{type(message).__name__} has no payload")
        match message:
            case Commit():
                self._commit(link, message)
            case Push():
                job, worker = self._worker(link, message.epoch)
                assert isinstance(worker.staging, PushedStaging)
                worker.staging.came(message.block, message.step)
                job.counters.network += job.layout.blocks[message.block].nbytes
            case Flush():
                link.send(Pushed(message.job, message.step))
            case Join():
                self._join(link, message, fds)
            case AskNorms():
                job, worker = self._worker(link, message.epoch)
                job.ask(worker.rank, message)
                self.go_on(job, ())
            case Read():
                job, _ = self._worker(link, None)
                block = self._held(job, message.block)
                answer = Contents(message.job, message.block, message.part, block.applied, block.updates)
                link.send(answer, payload=as_bytes(part_of(block, message.part)))
            case Write():
                data = self._incoming.pop(link)
                job, block, part = self._to_write(link, message)  # an epoch may have begun while it came
                if not block.complete:  # the answer may have been lost: what is there is the same
                    with block.lock:
                        for wanted in block.wanted:
                            wanted.take(block)
                        as_bytes(part)[:] = data
                    if message.complete:
                        block.applied, block.updates = message.applied, message.updates
                        self.orders.written(job, block)
                link.send(Written(message.job, message.block, message.part))
            case Extra():
                self._extra(link, message)
            case Expect():
                self.arrivals.expect(link, message, fds)
            case Expecting():
                self.moves.expected(known_job(self._jobs, message.job), link, message)
            case Adopt():
                self.arrivals.adopt(link, message)
            case Adopted():
                self.moves.adopted(known_job(self._jobs, message.job), link, message)
            case Refused():
                log.warning("another aggregator refused: %s", message.message)
                if message.job in self._jobs:  # a refusal is never answered by another one
                    self.moves.refused(self._jobs[message.job], link, message.message)
            case _:
                raise Refusal(refusals.BAD_MESSAGE, f"{type(message).__name__} is not for aggregators")

    def _join(self, link: Link, message: Join, fds: list[int]) -> None:
        job = known_job(self._jobs, message.job)
        if not hmac.compare_digest(message.token.encode(), job.token.encode()):
            raise Refusal(refusals.BAD_TOKEN, f"this is not the token of job {message.job}")
        link.trust()
        check_epoch(job, message.epoch)
        if message.rank not in job.members:
            raise Refusal(refusals.BAD_MESSAGE, f"rank {message.rank} is no member of {list(job.members)}")
        before = job.workers.get(message.rank)
        staging: Staging
        if message.shared:
            if len(fds) != 1:
                raise Refusal(refusals.BAD_MESSAGE, "a staging segment's file descriptor comes with it")
            try:
                staging = SharedStaging(job.spec, job.layout, fds.pop())
                self.pages.touch([staging.segment], lambda: None)
                self.pages.enlarge([staging.segment])
            except (ValueError, OSError) as error:
                raise Refusal(refusals.BAD_MESSAGE, str(error)) from error
        elif before is not None and before.link is link and isinstance(before.staging, PushedStaging):
            staging = before.staging
        else:
            staging = PushedStaging(job.spec)
            if before is None or not isinstance(before.staging, PushedStaging):  # else it takes that one's room
                self._check_gradients(job, message.rank)
        worker = Worker(message.rank, message.incarnation, link, staging)
        if before is not None and before.staging is not staging and not message.shared:
            job.commits.pop(message.rank, None)  # its gradients went with the old connection
        if before is not None and before.link is not link:
            self.leave(before)
        job.workers[message.rank] = worker
        self._workers[link] = job, worker
        self._joined(job, worker, [block for block in job.blocks.values() if block.complete])
        for index, (step, to) in job.given.items():  # it may have been away when the others were told
            if index not in job.expected:  # what comes back is not there any more
                link.send(Moved(job.spec.job, job.epoch, step, (index,), to))

    def _check_gradients(self, job: Job, rank: int) -> None:
        try:
            self.orders.room.check_gradients(job)
        except NoRoom as error:
            raise Refusal(refusals.QUOTA, f"no room for the gradients that rank {rank} pushes: {error}") from error

    def _joined(self, job: Job, worker: Worker, blocks: Sequence[HeldBlock]) -> None:
        fds = [block.segment.fd for block in blocks] if worker.link.shares_memory else []
        at_once = FDS_AT_ONCE if fds else max(1, len(blocks))
        for start in range(0, max(1, len(blocks)), at_once):
            some = blocks[start : start + at_once]
            hosted = tuple(Hosted(block.block.index, block.applied, block.memory) for block in some)
            worker.link.send(Joined(job.spec.job, job.epoch, hosted), fds=fds[start : start + at_once])

    def _commit(self, link: Link, message: Commit) -> None:
        job, worker = self._worker(link, message.epoch)
        if message.version is not None:
            check_version(message.version)
        indices = list(job.blocks)
        if message.blocks is not None:  # those that have just been given away are committed at who has them
            indices = [index for index in message.blocks if index in job.blocks or index in job.expected]
        late = [
            i for i in indices if i in job.blocks and job.blocks[i].complete and job.blocks[i].applied >= message.step
        ]
        if not message.skip and not worker.link.shares_memory:
            stagings = {worker.rank: worker.staging}
            lacking = [i for i in indices if i not in late and missing(stagings, job.layout.blocks[i], message.step)]
            if lacking:  # they went with an old connection, or with a block that has come back: they are pushed again
                text = f"gradients of blocks {lacking} were not pushed before the commit"
                link.send(Refused(message.job, refusals.NOT_OWNER, text, message.step, tuple(lacking)))
                indices = [index for index in indices if index not in lacking]
        if message.blocks is not None or len(indices) < len(job.blocks):
            message = msgspec.structs.replace(message, blocks=tuple(indices))
        for index in late:
            self.steps.tell(job, worker, job.blocks[index])
        job.commit(worker.rank, message)
        self.go_on(job, indices)

    def _extra(self, link: Link, message: Extra) -> None:
        data = self._incoming.pop(link, bytearray())
        job, _ = self._worker(link, message.epoch)
        check_version(message.version)
        if len(data) != (nbytes := extra_bytes(job, message)):
            raise Refusal(refusals.BAD_MESSAGE, f"{len(data)} bytes where {nbytes} belong")
        taken = ExtraTaken(message.job, message.version, message.tensor)
        self.saver.extra(job, message, data, lambda: link.send(taken))

    # What is where.

    def _worker(self, link: Link, epoch: int | None) -> tuple[Job, Worker]:
        known = self._workers.get(link)
        if known is None:
            raise Refusal(refusals.BAD_MESSAGE, "join first")
        if epoch is not None:
            check_epoch(known[0], epoch)
        return known

    def _block(self, job: Job, index: int) -> int:
        if index not in job.blocks and index not in job.expected:
            raise Refusal(refusals.NOT_OWNER, f"block {index} is not here")
        return index

    def _held(self, job: Job, index: int) -> HeldBlock:
        block = job.blocks.get(index)
        if block is None:
            raise Refusal(refusals.NOT_OWNER, f"block {index} is not here")
        return block

    def _to_write(self, link: Link, message: Write) -> tuple[Job, HeldBlock, Tensor]:
        job, _ = self._worker(link, message.epoch)
        block = self._held(job, message.block)
        if block.scheduled:
            raise Refusal(refusals.BAD_MESSAGE, f"step {block.scheduled} is being applied")
        return job, block, part_of(block, message.part)

    def _refuse(self, link: Link, message: Any, refusal: Refusal) -> None:
        step = getattr(message, "step", 0)
        blocks = (message.block,) if hasattr(message, "block") else ()
        job = message.spec.job if isinstance(message, Expect) else getattr(message, "job", "")
        link.send(Refused(job, refusal.code, refusal.message, step, blocks))
