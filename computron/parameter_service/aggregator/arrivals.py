"""Blocks that other aggregators hand over to here."""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Mapping

from computron.parameter_service.aggregator.checks import Refusal, check_epoch, known_job
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.aggregator.orders import Orders
from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.aggregator.room import NoRoom, make_room
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.link import Link
from computron.parameter_service.wire.messages import Adopt, Adopted, Expect, Expecting


class Arrivals:
    """key: of the service, which other aggregators must know. jobs: all that are here, by name."""

    def __init__(self, key: str, jobs: Mapping[str, Job], orders: Orders, pages: Pages) -> None:
        self._key = key
        self._jobs = jobs
        self._orders = orders
        self._pages = pages
        self._peers: set[Link] = set()

    def lost(self, link: Link) -> None:
        self._peers.discard(link)

    def expect(self, link: Link, message: Expect, fds: list[int]) -> None:
        """Have memory for what is to come, and say so. Raises Refusal."""
        self._check(link, message, fds)
        try:
            job = self._orders.expect(message)
            make_room(job, message.blocks, fds)
        except NoRoom as error:
            raise Refusal(refusals.QUOTA, str(error)) from error
        except ValueError as error:
            raise Refusal(refusals.STALE_EPOCH, str(error)) from error
        except OSError as error:
            raise Refusal(refusals.FAILED, str(error)) from error
        self._peers.add(link)
        expecting = Expecting(message.spec.job, message.epoch, message.blocks)
        self._pages.touch(
            [job.arriving[index] for index in message.blocks if index in job.arriving], lambda: link.send(expecting)
        )

    def _check(self, link: Link, message: Expect, fds: list[int]) -> None:
        if not hmac.compare_digest(message.key.encode(), self._key.encode()):
            raise Refusal(refusals.BAD_TOKEN, "this is not the service's key")
        link.trust()
        known = self._jobs.get(message.spec.job)
        if known is not None and not hmac.compare_digest(message.token.encode(), known.token.encode()):
            raise Refusal(refusals.BAD_TOKEN, f"this is not the token of job {message.spec.job}")
        if link.shares_memory and len(fds) != len(message.blocks):
            raise Refusal(refusals.BAD_MESSAGE, f"{len(fds)} file descriptors came for {len(message.blocks)} blocks")

    def room(self, link: Link, message: Adopt) -> memoryview:
        """The memory that the block comes into, or is in. Raises Refusal."""
        job = known_job(self._jobs, message.job)
        check_epoch(job, message.epoch)
        if link not in self._peers or message.block not in job.expected or message.block not in job.arriving:
            raise Refusal(refusals.BAD_MESSAGE, f"block {message.block} is not expected")
        return job.arriving[message.block].view()

    def adopt(self, link: Link, message: Adopt) -> None:
        """The block is here. Raises Refusal."""
        self.room(link, message)
        job = known_job(self._jobs, message.job)
        segment, memory = job.arriving.pop(message.block), message.memory if link.shares_memory else uuid.uuid4().hex
        link.send(Adopted(message.job, message.epoch, message.block))  # before a step changes what the other one keeps
        self._orders.adopt(job, message, segment, memory)
