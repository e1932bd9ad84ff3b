"""Between agents and the master."""

from __future__ import annotations

import msgspec

from computron.parameter_service.wire.messages.jobs import Address, JobSpec


class Enlist(msgspec.Struct, tag="enlist", frozen=True):
    """A worker wants to take part in a job, which begins with the first that comes. rank: None to be given one. epoch,
    step: that it is in and has seen, if it was told of any.
    """

    spec: JobSpec
    token: str
    rank: int | None
    incarnation: str
    machine: str
    epoch: int = 0
    step: int = 0


class Placement(msgspec.Struct, tag="placement", frozen=True):
    """What holds from now on. owners: place in `addresses` of each block's owner.

    applied: the step from which the job goes on; one before that which a worker is in loses nothing, and a smaller one
    means that it was rolled back. lost: steps that were. initialise: this worker brings the first parameters. loads:
    how often the workers have loaded a state; loading: this epoch is there for the last of these, and who initialises
    brings parameters and states.
    """

    job: str
    epoch: int
    rank: int
    members: tuple[int, ...]
    owners: tuple[int, ...]
    addresses: tuple[Address, ...]
    applied: int = 0
    lost: int = 0
    initialise: bool = False
    loads: int = 0
    loading: bool = False
    reason: str = ""


class Load(msgspec.Struct, tag="load", frozen=True):
    """This worker, which has seen `step`, wants the job to go on from a state that it has: the job's load of this
    number. When all members say so, an epoch begins in which one brings it. Said again until it is `Loaded`. ready: all
    blocks of that epoch are complete.
    """

    job: str
    rank: int
    epoch: int
    number: int
    step: int
    ready: bool


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    """The job has the state that was loaded, and a failure does not lose it."""

    job: str
    number: int


class Unpublished(msgspec.Struct, tag="unpublished", frozen=True):
    """This version did not come about, and will not."""

    job: str
    version: str
    message: str


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """Mean seconds of the iterations since this worker last reported: wait, in which it did nothing but wait for the
    service, and compute, the rest.
    """

    job: str
    rank: int
    epoch: int
    step: int
    compute: float
    wait: float


class Unreachable(msgspec.Struct, tag="unreachable", frozen=True):
    """This worker cannot connect to that aggregator; said again as long as that is so."""

    job: str
    rank: int
    epoch: int
    address: Address
    reason: str


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """This worker has had the answer to `step` and commits no more."""

    job: str
    rank: int
    step: int
    reason: str = ""


class Denied(msgspec.Struct, tag="denied", frozen=True):
    """This worker can take no part."""

    job: str
    code: str
    message: str
