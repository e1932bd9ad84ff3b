"""What must hold of what workers and other aggregators send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from computron.errors import BadRequest
from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.versions import names
from computron.parameter_service.versions.header import DTYPES
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.link import Link
from computron.parameter_service.wire.messages import Adopt, Extra, Push, Write


class Refusal(Exception):
    """What a peer asks for cannot be done. code: one of wire.refusals."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Repeated(Exception):
    """What came has been used already: nothing is done with it."""


def known_job(jobs: Mapping[str, Job], name: str) -> Job:
    """Raises Refusal if it is not here."""
    job = jobs.get(name)
    if job is None:
        raise Refusal(refusals.UNKNOWN_JOB, f"job {name} is not here")
    return job


def check_epoch(job: Job, epoch: int) -> None:
    """Raises Refusal if the job is not trained in this epoch."""
    if epoch != job.epoch or job.held:
        raise Refusal(refusals.STALE_EPOCH, f"job {job.spec.job} is in epoch {job.epoch}, not {epoch}")


def needs_payload(link: Link, message: Any) -> bool:
    """Where memory is shared, a block's state comes with `Expect`, not with `Adopt`."""
    return isinstance(message, Push | Write) or (isinstance(message, Adopt) and not link.shares_memory)


def extra_bytes(job: Job, message: Extra) -> int:
    """Raises Refusal if the job has no such tensor."""
    if not 0 <= message.tensor < len(job.spec.extras):
        raise Refusal(refusals.BAD_MESSAGE, f"the job has no tensor {message.tensor} that is not trained")
    tensor = job.spec.extras[message.tensor]
    return tensor.elements * DTYPES[tensor.dtype].size


def check_version(version: str) -> None:
    """Raises Refusal if this cannot be the name of a version."""
    try:
        names.check_version(version)
    except BadRequest as error:
        raise Refusal(refusals.BAD_MESSAGE, error.message) from error


def part_of(block: HeldBlock, part: str) -> Tensor:
    """Raises Refusal if a block has none of this name."""
    found = block.parts.get(part)
    if found is None:
        raise Refusal(refusals.BAD_MESSAGE, f"a block has no {part}; it has {', '.join(block.parts)}")
    return found
