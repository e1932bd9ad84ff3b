"""Between aggregators and the master."""

from __future__ import annotations

import msgspec

from computron.parameter_service.wire.messages.jobs import Address, Hyperparameters, JobSpec


class BlockState(msgspec.Struct, frozen=True, array_like=True):
    block: int
    applied: int


class HostedJob(msgspec.Struct, frozen=True):
    """spec and token let a master that has lost its log take the job up again. held: it waits for an order to go on."""

    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    blocks: tuple[BlockState, ...]
    held: bool = False


class Register(msgspec.Struct, tag="register", frozen=True):
    """An aggregator comes, or comes again. memory: bytes that it may use."""

    address: Address
    key: str
    pid: int
    memory: int
    jobs: tuple[HostedJob, ...]


class Registered(msgspec.Struct, tag="registered", frozen=True):
    """drop: jobs that the aggregator has and should not have."""

    drop: tuple[str, ...] = ()


KEEP, FRESH = "keep", "worker"  # sources of a block's state; any other is a snapshot's path


class Host(msgspec.Struct, tag="host", frozen=True):
    """From this epoch on own exactly these blocks of the job, all at step `applied`, with these members.

    source: "keep" what is there; "worker": one will write them; otherwise the snapshot's file that they are read from.
    Other blocks of the job are forgotten, unfinished moves too. kept: as `Kept.step`. history: as in `Saved`, at the
    least: another source than "keep" begins one.
    """

    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    blocks: tuple[int, ...]
    applied: int
    source: str
    kept: int | None = 0
    history: int = 0


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """These blocks are complete here, at these steps. Where a worker is to write them, the answer to `Host` has none:
    workers may come.
    """

    job: str
    epoch: int
    blocks: tuple[BlockState, ...]


class Move(msgspec.Struct, tag="move", frozen=True):
    """Give these blocks to another aggregator at the next step boundary, if the job is still in this epoch."""

    job: str
    epoch: int
    blocks: tuple[int, ...]
    to: Address


class MovedOut(msgspec.Struct, tag="moved_out", frozen=True):
    """The other aggregator has them. applied: the last step that was applied here."""

    job: str
    epoch: int
    blocks: tuple[int, ...]
    to: str
    applied: int


class Hold(msgspec.Struct, tag="hold", frozen=True):
    """Enter this epoch: refuse what has an older one, apply nothing but what `Complete` asks for, and say how things
    stand. Answered by `Held`, with no blocks where the job is unknown.
    """

    job: str
    epoch: int


class HeldCommit(msgspec.Struct, frozen=True, array_like=True):
    """What one member's last commit here said."""

    rank: int
    step: int
    groups: tuple[Hyperparameters, ...]
    scale: float
    skip: bool
    version: str | None


class Held(msgspec.Struct, tag="held", frozen=True):
    """blocks: that are complete here, those included whose move was announced but not accepted: `leaving`. Whoever was
    to have one of these may have it. empty: blocks that are here and have got no state yet. history: of all of them, as
    in `Saved`.
    """

    job: str
    epoch: int
    blocks: tuple[BlockState, ...]
    commits: tuple[HeldCommit, ...]
    leaving: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    history: int = 0


class Complete(msgspec.Struct, tag="complete", frozen=True):
    """Apply this step, which other blocks have seen, to these, which lack it. commits: of all who took part in it;
    their gradients are staged here, because nobody commits before they are. Answered by `Ready`.
    """

    job: str
    epoch: int
    step: int
    blocks: tuple[int, ...]
    commits: tuple[HeldCommit, ...]


class Kept(msgspec.Struct, tag="kept", frozen=True):
    """The job's snapshot of this step is complete. So that a failure costs no more than `snapshot_every` steps, an
    aggregator that is connected to the master applies none further behind the last complete snapshot. None: one could
    not be written; until one is, steps are not limited.
    """

    job: str
    step: int | None


class Keep(msgspec.Struct, tag="keep", frozen=True):
    """Take a snapshot of the job as it is now, if it is still in this epoch: nobody works on it any more."""

    job: str
    epoch: int


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Forget the job. Its files stay."""

    job: str


class WorkerLost(msgspec.Struct, tag="worker_lost", frozen=True):
    """The connection to this worker ended without its leave."""

    job: str
    rank: int
    incarnation: str


class Saved(msgspec.Struct, tag="saved", frozen=True):
    """These blocks of a snapshot ("") or a version are in its file, and these extras of a version. history: of the job
    when a version was ordered: the epoch in which it last went back to an earlier state, or began.
    """

    job: str
    version: str
    step: int
    path: str
    blocks: tuple[int, ...] = ()
    extras: tuple[int, ...] = ()
    history: int = 0


class JobUsage(msgspec.Struct, frozen=True):
    """Since the last report. cpu: seconds of the compute thread; steps: how many; late: seconds past the deadlines,
    summed. cpu_per_block: seconds a step, smoothed. behind: seconds of the compute thread that other jobs' work took
    while this one's waited.
    """

    job: str
    cpu: float
    steps: int
    late: float
    memory: int
    network: int
    cpu_per_block: tuple[tuple[int, float], ...]
    behind: float


class Usage(msgspec.Struct, tag="usage", frozen=True):
    """seconds: since the last report. busy: of the compute thread. cpu: of the whole process."""

    aggregator: str
    seconds: float
    busy: float
    cpu: float
    memory: int
    jobs: tuple[JobUsage, ...]


NO_FOLDER = "it was started without a folder for snapshots and versions: give it one with --snapshots"


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """An order could not be carried out. order: "hold", "complete", "host", "move", "step", "save" (of a snapshot) or
    "publish"; "restore" if the snapshot that blocks were to come from is damaged, "find" if it is not there. message:
    NO_FOLDER where nothing can be saved or published at all. step: the last that any block here has seen, of an order
    to save; of an order to publish that of the version, which `version` names, with its file's path if it has one, and
    its history, as in `Saved`.
    """

    job: str
    epoch: int
    order: str
    message: str
    step: int = 0
    version: str = ""
    path: str = ""
    history: int = 0


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the process: nothing is here any more."""
