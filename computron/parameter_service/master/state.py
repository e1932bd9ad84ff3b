"""What the parts of the master share: aggregators, jobs, workers and links as they are now, and the orders so far."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from computron.parameter_service.layout import Layout
from computron.parameter_service.master.events import Close, Log, Order, Send
from computron.parameter_service.master.records import Book, JobBook, Record
from computron.parameter_service.specs import block_bytes
from computron.parameter_service.wire.messages import KEEP, Address, Denied, FromMaster, Held, Load, Usage

SMOOTHING = 0.2  # of what aggregators report of waits: the weight of the newest
REPORTS = 5  # of a worker, each of a second or of an iteration, from which its times are taken


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, memory in bytes.

    hold: within which an aggregator must answer. join: how long a worker waits for others that come with it. loss: how
    long both of a worker's links must be down. absence: how long a member may be away from the master while the job
    stands still. unreachable: how long members may say, while the job stands still, that they cannot reach an
    aggregator that is up; what is not repeated within `repeated` is over. away: how long a job may stand still while an
    aggregator of it is away from the master. exclusion: how long an aggregator that did not answer or could not be
    reached gets nothing of the job. idle: after which a job that nobody works on gives its memory back. forget: how
    long an aggregator that has nothing is remembered without a link. still: how long nothing of a job is moved after a
    move that failed. read_rate: bytes a second at which a snapshot is read or written at the least.
    """

    hold: float = 2.0
    join: float = 0.05
    loss: float = 0.2
    absence: float = 3.0
    unreachable: float = 1.0
    repeated: float = 3.0
    away: float = 30.0
    exclusion: float = 10.0
    idle: float = 600.0
    forget: float = 60.0
    still: float = 5.0
    read_rate: float = 50e6
    max_job_memory: int | None = None


@dataclass(slots=True)
class Aggregator:
    """address: None until it has registered. link: None while it has none; `unlinked` says since when."""

    id: str
    pid: int
    unlinked: float
    address: Address | None = None
    link: int | None = None
    memory: int = 0
    draining: bool = False
    stopping: bool = False
    usage: Usage | None = None
    cpu: float = 0.0


@dataclass(slots=True)
class Worker:
    """unlinked: since when it has no link. lost: an aggregator has said that its connection ended. compute, wait:
    seconds of an iteration, medians of the last reports. times: these reports, of where the job is now. reports: how
    many there were of all. load: what it last said of a state that it loads.
    """

    rank: int
    incarnation: str
    machine: str
    link: int | None
    came: float
    unlinked: float = 0.0
    lost: bool = False
    lost_for_certain: bool = False
    step: int = 0
    compute: float = 0.0
    wait: float = 0.0
    times: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=REPORTS))
    reports: int = 0
    load: Load | None = None

    def lives(self) -> None:
        """It has been heard."""
        self.lost = self.lost_for_certain = False

    def took(self, compute: float, wait: float) -> None:
        self.reports += 1
        self.times.append((compute, wait))
        self.compute, self.wait = map(statistics.median, zip(*self.times, strict=True))


class Phase(Enum):
    COLLECTING = "collecting"  # of Held
    PLACING = "placing"  # there is no aggregator to place blocks at
    COMPLETING = "completing"  # the step that some blocks have seen and others not
    HOSTING = "hosting"  # until all blocks are ready


@dataclass(slots=True)
class Change:
    """A reconfiguration of a job: see `reconfiguration`. waiting: blocks that are not ready yet. loads: number of the
    load that it is there for, if it is.
    """

    epoch: int
    reason: str
    deadline: float
    phase: Phase = Phase.COLLECTING
    awaited: set[str] = field(default_factory=set)
    held: dict[str, Held] = field(default_factory=dict)
    owners: list[str] = field(default_factory=list)
    members: dict[int, str] = field(default_factory=dict)
    applied: int = 0
    lost: int = 0
    source: str = KEEP
    waiting: set[int] = field(default_factory=set)
    loads: int = 0


@dataclass(slots=True)
class Unfinished:
    """Blocks, and extras of a version, that are in a file. since: the last of them."""

    blocks: set[int] = field(default_factory=set)
    extras: set[int] = field(default_factory=set)
    since: float = 0.0


@dataclass(slots=True)
class Doubt:
    """When members first and last said, again and again and since the last step, that they cannot reach it."""

    first: float
    last: float


@dataclass(slots=True)
class Job:
    """excluded: aggregators that count as lost for this job, until when. silent: those of them that only did not answer
    in time: what they have counts if they do. doubted: those that a member says it cannot reach. mismatch: an
    aggregator has something else than what the book says. mismatch_of_log: the log did not have the job, an aggregator
    had. step: the highest heard of. progressed: when it last rose. cpu: seconds of compute thread a step, by block.
    cpu_total: seconds of it so far. saving: by version ("" for a snapshot), step, path and history. hosts: aggregators
    that have or had blocks. fenced: those of `Placed.unfenced` that can do no harm any more.
    behind: seconds of others' work for which a step waits, by aggregator. still_until: until then nothing is moved.
    overhead: seconds of an iteration in which it waits for the service though no aggregator works for it or for
    others, as measured when it shared none; None if it never was. reverted: how often it was slower than predicted
    where it shared. trouble: why the last snapshot did not come about; until one of step `trouble_step` or a later one
    does, steps are not limited. without_folder: that nothing can be saved has been logged. unpublished: why the last
    version did not come about; unpublished_files: name, step and history of all that did not since the job
    last went back. extras_until: whoever had what is not trained for versions up to this step has gone. broken: why it
    cannot go on in this epoch, as an aggregator said. idle_since: nobody has worked on it since then. kept_by: until
    then its last step is to be in a snapshot, to be dropped. missing: aggregators that do not find the last snapshot.
    unbrought: an aggregator has not taken blocks that a worker was to bring: no step was taken since.
    """

    book: JobBook
    layout: Layout
    since: float
    workers: dict[int, Worker] = field(default_factory=dict)
    change: Change | None = None
    excluded: dict[str, float] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    doubted: dict[str, Doubt] = field(default_factory=dict)
    mismatch: bool = False
    mismatch_of_log: bool = False
    unbrought: bool = False
    step: int = 0
    progressed: float = 0.0
    cpu: dict[int, float] = field(default_factory=dict)
    behind: dict[str, float] = field(default_factory=dict)
    cpu_total: float = 0.0
    late: float = 0.0
    saving: dict[tuple[str, int, str, int], Unfinished] = field(default_factory=dict)
    hosts: set[str] = field(default_factory=set)
    fenced: set[str] = field(default_factory=set)
    still_until: float = 0.0
    overhead: float | None = None
    reverted: int = 0
    trouble: str = ""
    trouble_step: int = 0
    unpublished: str = ""
    unpublished_files: set[tuple[str, int, int]] = field(default_factory=set)
    extras_until: int = -1
    without_folder: bool = False
    broken: str = ""
    idle_since: float | None = None
    kept_by: float | None = None

    @property
    def name(self) -> str:
        return self.book.job

    @property
    def failed(self) -> str | None:
        return self.book.failed

    @property
    def holders(self) -> set[str]:
        """Aggregators that may have blocks of it."""
        return (set(self.book.owners) | set(self.book.moving.values()) | self.hosts) - {""}

    @property
    def places(self) -> list[str]:
        """Where each block is going to be; none if nothing is known of that."""
        if self.change is not None and self.change.phase is Phase.HOSTING:
            return self.change.owners
        return [self.book.moving.get(block, owner) for block, owner in enumerate(self.book.owners)]

    @property
    def unfenced(self) -> dict[str, tuple[tuple[int, str], ...]]:
        """Aggregators that may still be in an epoch before the last placement's, with the members of that epoch."""
        placed = self.book.placed
        return {name: who for name, who in placed.unfenced if name not in self.fenced} if placed is not None else {}

    @property
    def linked(self) -> list[Worker]:
        return [worker for _, worker in sorted(self.workers.items()) if worker.link is not None]

    def exclude(self, aggregators: Iterable[str], until: float, *, silent: bool = False) -> None:
        names = set(aggregators)
        self.excluded.update(dict.fromkeys(names, until))
        self.silent = self.silent | names if silent else self.silent - names

    def readmit(self, aggregators: Iterable[str]) -> None:
        """They have answered after all."""
        for name in set(aggregators):
            self.excluded.pop(name, None)

    def note_behind(self, aggregator: str, seconds: float) -> None:
        before = self.behind.get(aggregator, seconds)
        self.behind[aggregator] = before + SMOOTHING * (seconds - before)

    def saw(self, step: int, now: float) -> None:
        if step > self.step:
            self.step = step
            self.progressed = now


def memory_of(job: Job, block: int) -> int:
    """Bytes of a block with its optimizer state."""
    return block_bytes(job.book.spec, job.layout.blocks[block])


class State:
    def __init__(self, book: Book, limits: Limits) -> None:
        self.book = book
        self.limits = limits
        self.aggregators: dict[str, Aggregator] = {}
        self.jobs: dict[str, Job] = {}
        self.links: dict[int, str | tuple[str, int]] = {}  # aggregator's name, or job and rank
        self.orders: list[Order] = []
        self.alone: dict[str, float] = {}  # jobs that were slower than predicted where they shared; share nothing until
        self.epochs: dict[str, int] = {}  # the last that files are of, by job, also of jobs that no log knows
        self.migrations = 0
        self.reconfigurations = 0
        self.rollbacks = 0

    def write(self, record: Record) -> None:
        self.book.apply(record)
        self.orders.append(Log(record))

    def send(self, link: int | None, message: FromMaster) -> None:
        """Nothing if the link is down: who comes back is told how things stand then."""
        if link is not None:
            self.orders.append(Send(link, message))

    def dismiss(self, link: int | None, job: str, code: str, message: str) -> None:
        """Tell a worker that it can take no part."""
        if link is not None:
            self.links.pop(link, None)
            self.orders += (Send(link, Denied(job, code, message)), Close(link))

    def tell(self, aggregator: str, message: FromMaster) -> None:
        known = self.aggregators.get(aggregator)
        if known is not None:
            self.send(known.link, message)

    def is_linked(self, aggregator: str) -> bool:
        known = self.aggregators.get(aggregator)
        return known is not None and known.link is not None

    def usable(self, job: Job) -> list[Aggregator]:
        """Where blocks of the job may be placed, in order of their names."""
        return [
            aggregator
            for name, aggregator in sorted(self.aggregators.items())
            if aggregator.link is not None
            and aggregator.address is not None
            and not aggregator.draining
            and not aggregator.stopping
            and name not in job.excluded
        ]
