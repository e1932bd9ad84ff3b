"""What the master is told (facts) and what it orders."""

from __future__ import annotations

from dataclasses import dataclass

from computron.parameter_service.master.records import Record
from computron.parameter_service.wire.messages import FromMaster, ToMaster

# Events.


@dataclass(frozen=True, slots=True)
class Received:
    """A message over a link, which has a number of its own for as long as it is up."""

    link: int
    message: ToMaster


@dataclass(frozen=True, slots=True)
class Closed:
    link: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Started:
    """A process of this machine was started; it is to register under this name. began: its start time, which with the
    pid tells it from any other."""

    aggregator: str
    pid: int
    began: float


@dataclass(frozen=True, slots=True)
class Exited:
    """The process of this aggregator is known to be dead, or a person said so."""

    aggregator: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A file has its final name. version: "" for a snapshot. at: seconds since 1970."""

    job: str
    version: str
    step: int
    path: str
    at: float


@dataclass(frozen=True, slots=True)
class NotFinished:
    """A file could not be given its name. version: "" for a snapshot. history: as in `Finish`."""

    job: str
    version: str
    step: int
    path: str
    message: str
    history: int = 0


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """blocks: None for all of the job."""

    job: str
    blocks: tuple[int, ...] | None
    to: str


@dataclass(frozen=True, slots=True)
class DrainAsked:
    aggregator: str


@dataclass(frozen=True, slots=True)
class DropAsked:
    job: str


@dataclass(frozen=True, slots=True)
class QuotaAsked:
    """memory: bytes that the job may have; None: what all may."""

    job: str
    memory: int | None


@dataclass(frozen=True, slots=True)
class CountAsked:
    """So many aggregators at least."""

    count: int


Asked = MoveAsked | DrainAsked | DropAsked | QuotaAsked | CountAsked
Event = Received | Closed | Tick | Started | Exited | Finished | NotFinished | Asked

# Orders, to be carried out one after the other; a record is on the disk before what follows it is sent.


@dataclass(frozen=True, slots=True)
class Log:
    record: Record


@dataclass(frozen=True, slots=True)
class Send:
    link: int
    message: FromMaster


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing that still comes over this link is meant."""

    link: int


@dataclass(frozen=True, slots=True)
class Start:
    """An aggregator's process on this machine."""

    aggregator: str


@dataclass(frozen=True, slots=True)
class Finish:
    """All blocks are in this file, which may have its name now. version: "" for a snapshot. history: as in `Saved`.
    count: of its blocks and extras.
    """

    job: str
    version: str
    step: int
    path: str
    history: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Prune:
    """The snapshot of this path is complete: older ones, unfinished ones too, may go, but for those of `keep`."""

    path: str
    keep: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """A version's file that will not be complete. history: as in `Saved`. step: only if the file is of this step."""

    path: str
    history: int = 0
    step: int | None = None


Order = Log | Send | Close | Start | Finish | Prune | Discard
