"""What must outlive the master, as records of its log, and the book that they add up to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from computron.parameter_service.versions.names import begun_of
from computron.parameter_service.wire.messages import Address, JobSpec

SNAPSHOTS_KEPT = 2
DROPPED_KEPT = 1000  # names of deleted jobs
NOTHING = -1  # no step of an older epoch counts


class JobCreated(msgspec.Struct, tag="job_created", frozen=True):
    """epoch: the last of an earlier job of this name, of which nothing counts: this one's come after it."""

    spec: JobSpec
    token: str
    epoch: int = 0


class EpochBegun(msgspec.Struct, tag="epoch_begun", frozen=True):
    """Written before anybody hears of the epoch."""

    job: str
    epoch: int


class Placed(msgspec.Struct, tag="placed", frozen=True):
    """The reconfiguration that began with `epoch` is complete. members: rank and incarnation. owners: of each block.
    lost: steps that this one rolled back. initialise: rank that brings the parameters. unfenced: aggregators that could
    not be told of this epoch, each with the members of the epoch that it may still be in. loads: how often the workers
    have loaded a state.
    """

    job: str
    epoch: int
    members: tuple[tuple[int, str], ...]
    owners: tuple[str, ...]
    applied: int
    lost: int = 0
    initialise: int | None = None
    reason: str = ""
    unfenced: tuple[tuple[str, tuple[tuple[int, str], ...]], ...] = ()
    loads: int = 0


class MoveBegun(msgspec.Struct, tag="move_begun", frozen=True):
    """From now on, the blocks may be at `to` as well as at their owner."""

    job: str
    blocks: tuple[int, ...]
    to: str


class MoveEnded(msgspec.Struct, tag="move_ended", frozen=True):
    """owner: who has the blocks now: the new one, or the old one if it came to nothing."""

    job: str
    blocks: tuple[int, ...]
    owner: str


class MemberGone(msgspec.Struct, tag="member_gone", frozen=True):
    """certain: it left, or its process is known to be dead; otherwise it may only be cut off."""

    job: str
    rank: int
    certain: bool


class SnapshotSaved(msgspec.Struct, tag="snapshot_saved", frozen=True):
    job: str
    step: int
    path: str


class SavingFailed(msgspec.Struct, tag="saving_failed", frozen=True):
    """No snapshot came about when one was due, and steps are taken all the same. Written before anybody is told so."""

    job: str


class RolledBack(msgspec.Struct, tag="rolled_back", frozen=True):
    """With this epoch the job goes back to step `applied`: what earlier epochs have saved of later steps is void.
    Written before anybody hears of it.
    """

    job: str
    epoch: int
    applied: int


class StateLoaded(msgspec.Struct, tag="state_loaded", frozen=True):
    """The job has what its workers loaded, the load of this number."""

    job: str
    number: int


class SnapshotBad(msgspec.Struct, tag="snapshot_bad", frozen=True):
    job: str
    path: str


class VersionSaved(msgspec.Struct, tag="version_saved", frozen=True):
    """at: seconds since 1970."""

    job: str
    version: str
    step: int
    path: str
    at: float


class Totals(msgspec.Struct, tag="totals", frozen=True):
    """Steps rolled back and blocks moved, of records that are not in the log any more."""

    job: str
    lost: int
    moves: int


class JobFailed(msgspec.Struct, tag="job_failed", frozen=True):
    job: str
    reason: str


class JobUnhosted(msgspec.Struct, tag="job_unhosted", frozen=True):
    """Its blocks are nowhere now: nobody worked on the job any more, and it can be taken up from its last snapshot, or
    it has failed.
    """

    job: str


class JobDropped(msgspec.Struct, tag="job_dropped", frozen=True):
    """epoch: its last, if the records before this one do not say it."""

    job: str
    epoch: int = 0


class QuotaSet(msgspec.Struct, tag="quota_set", frozen=True):
    """Of the job of this name, whether it is there already or not. None: what all may have."""

    job: str
    memory: int | None


class AggregatorStarted(msgspec.Struct, tag="aggregator_started", frozen=True):
    """By this master, on its own machine."""

    aggregator: str
    pid: int
    began: float


class AggregatorKnown(msgspec.Struct, tag="aggregator_known", frozen=True):
    """It has registered: workers that nobody told yet can be told where it is, also when it is away."""

    address: Address
    pid: int


class AggregatorGone(msgspec.Struct, tag="aggregator_gone", frozen=True):
    aggregator: str


class CountSet(msgspec.Struct, tag="count_set", frozen=True):
    minimum: int


Record = (
    JobCreated | EpochBegun | Placed | MoveBegun | MoveEnded | MemberGone | SnapshotSaved | SnapshotBad | VersionSaved
    | SavingFailed | RolledBack | StateLoaded | Totals | JobFailed | JobUnhosted | JobDropped | QuotaSet
    | AggregatorStarted | AggregatorKnown | AggregatorGone | CountSet
)  # fmt: skip


@dataclass(slots=True)
class JobBook:
    """One job as the log has it. placed: what the last complete reconfiguration came to, with moves since carried on.

    epoch: the newest that was ever used; above placed.epoch while a reconfiguration is going on. gone: members of
    `placed` that are not there any more, and whether that is certain. lost: steps rolled back ever. loaded: how often a
    state was loaded, without one that is being loaded. unsaved: steps may have been taken that no snapshot precedes.
    """

    spec: JobSpec
    token: str
    epoch: int = 0
    placed: Placed | None = None
    moving: dict[int, str] = field(default_factory=dict)
    gone: dict[int, bool] = field(default_factory=dict)
    snapshots: list[SnapshotSaved] = field(default_factory=list)
    versions: dict[str, VersionSaved] = field(default_factory=dict)
    rollbacks: list[RolledBack] = field(default_factory=list)
    unsaved: bool = False
    failed: str | None = None
    lost: int = 0
    moves: int = 0
    loaded: int = 0

    @property
    def job(self) -> str:
        return self.spec.job

    @property
    def loads(self) -> int:
        """How often a state was loaded, with one that is being loaded."""
        return max(self.loaded, self.placed.loads if self.placed is not None else 0)

    @property
    def files(self) -> set[str]:
        """Paths of all that is complete."""
        return {saved.path for saved in self.snapshots} | {saved.path for saved in self.versions.values()}

    def counts(self, step: int, epoch: int) -> bool:
        """Whether what was saved in that epoch after that step is of the job's history, and was not rolled back."""
        return all(step <= back.applied for back in self.rollbacks if epoch < back.epoch)

    @property
    def history(self) -> int:
        """The epoch in which the job last went back to an earlier state, as far as the log knows."""
        return max((back.epoch for back in self.rollbacks), default=0)

    @property
    def counted(self) -> list[SnapshotSaved]:
        """Complete snapshots that the job can go on from."""
        begun = [(begun_of(Path(saved.path)), saved) for saved in self.snapshots]
        return [saved for of, saved in begun if of is None or self.counts(*of)]

    @property
    def owners(self) -> tuple[str, ...]:
        return self.placed.owners if self.placed is not None else ()

    @property
    def members(self) -> dict[int, str]:
        return dict(self.placed.members) if self.placed is not None else {}


class Book:
    """All that a master knows after reading its log. `apply` is what replay does, and the only way to change it."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobBook] = {}
        self.started: dict[str, AggregatorStarted] = {}
        self.known: dict[str, AggregatorKnown] = {}
        self.minimum: int | None = None
        self.quotas: dict[str, int] = {}
        # The last epochs of deleted jobs, the oldest first: an aggregator that was away may still have them.
        self.dropped: dict[str, int] = {}

    def apply(self, record: Record) -> None:
        """Raises KeyError if it is about a job that no earlier record made."""
        match record:
            case JobCreated():
                self.jobs[record.spec.job] = _new_book(record)
                self.dropped.pop(record.spec.job, None)
            case JobDropped():
                known = self.jobs.pop(record.job, None)
                self.dropped[record.job] = record.epoch if known is None else known.epoch
                for oldest in list(self.dropped)[:-DROPPED_KEPT]:
                    del self.dropped[oldest]
            case AggregatorStarted():
                self.started[record.aggregator] = record
            case AggregatorKnown():
                self.known[record.address.aggregator] = record
            case AggregatorGone():
                self.started.pop(record.aggregator, None)
                self.known.pop(record.aggregator, None)
            case CountSet():
                self.minimum = record.minimum
            case QuotaSet(memory=None):
                self.quotas.pop(record.job, None)
            case QuotaSet(memory=int() as memory):
                self.quotas[record.job] = memory
            case _:
                _apply_to_job(self.jobs[record.job], record)

    def records(self) -> Iterator[Record]:
        """The shortest log that adds up to this book."""
        yield from self.started.values()
        yield from self.known.values()
        if self.minimum is not None:
            yield CountSet(self.minimum)
        for name, memory in self.quotas.items():
            yield QuotaSet(name, memory)
        for name, epoch in self.dropped.items():
            yield JobDropped(name, epoch)
        for job in self.jobs.values():
            yield from _records_of(job)


def _new_book(record: JobCreated) -> JobBook:
    book = JobBook(record.spec, record.token, record.epoch)
    if record.epoch:
        book.rollbacks.append(RolledBack(book.job, record.epoch + 1, NOTHING))
    return book


def _apply_to_job(book: JobBook, record: Record) -> None:
    match record:
        case EpochBegun():
            book.epoch = max(book.epoch, record.epoch)
        case Placed():
            book.placed = record
            book.epoch = max(book.epoch, record.epoch)
            book.lost += record.lost
            book.moving.clear()
            book.gone.clear()
        case MoveBegun():
            book.moving.update(dict.fromkeys(record.blocks, record.to))
        case MoveEnded():
            _end_move(book, record)
        case MemberGone():
            book.gone[record.rank] = book.gone.get(record.rank, False) or record.certain
        case SnapshotSaved():
            book.snapshots = [*book.counted, record][-SNAPSHOTS_KEPT:]
            book.unsaved = False
        case SavingFailed():
            book.unsaved = True
        case SnapshotBad():
            book.snapshots = [snapshot for snapshot in book.snapshots if snapshot.path != record.path]
        case VersionSaved():
            book.versions[record.version] = record
        case JobUnhosted():
            book.placed = None
            book.moving.clear()
            book.gone.clear()
        case StateLoaded():
            book.loaded = record.number
        case RolledBack():
            book.rollbacks = [back for back in book.rollbacks if back.applied < record.applied]
            book.rollbacks.append(record)  # those it leaves out would void nothing besides
            book.unsaved = False
        case Totals():
            book.lost, book.moves = record.lost, record.moves
        case JobFailed():
            book.failed = record.reason
        case _:
            raise AssertionError(f"{record} is about no job")


def _end_move(book: JobBook, record: MoveEnded) -> None:
    for block in record.blocks:
        book.moving.pop(block, None)
    if book.placed is None:
        return
    owners = list(book.placed.owners)
    for block in record.blocks:
        book.moves += owners[block] != record.owner
        owners[block] = record.owner
    book.placed = msgspec.structs.replace(book.placed, owners=tuple(owners))


def _records_of(book: JobBook) -> Iterator[Record]:
    yield JobCreated(book.spec, book.token)
    if book.placed is not None:
        yield book.placed
    yield EpochBegun(book.job, book.epoch)
    yield Totals(book.job, book.lost, book.moves)
    for block, to in book.moving.items():
        yield MoveBegun(book.job, (block,), to)
    for rank, certain in book.gone.items():
        yield MemberGone(book.job, rank, certain)
    if book.loaded:
        yield StateLoaded(book.job, book.loaded)
    yield from book.rollbacks
    yield from book.snapshots
    yield from book.versions.values()
    if book.unsaved:
        yield SavingFailed(book.job)
    if book.failed is not None:
        yield JobFailed(book.job, book.failed)
