"""What agents, aggregators and the master tell each other, as msgspec Structs. No pickle: decoding makes only these.

Every message about parameters names `(job, epoch, step)` and its blocks, and may come twice: who has it already
answers as before. `epoch` is the master's count of a job's reconfigurations (members change, somebody died, it rolls
back); who has an older one is refused with "stale_epoch". Within an epoch a block changes hands only by its owner's
act. `step` 1 is the first; `applied` is the last step that a block has seen, 0 before the first; `updates` counts the
steps that have changed it, as torch's state "step" does: those that were skipped do not.
"""

from __future__ import annotations

from typing import Any

import msgspec

from computron.parameter_service.layout import TensorSpec

VERSION = 1


class Hyperparameters(msgspec.Struct, frozen=True, array_like=True):
    """Of one parameter group at one step, as torch.optim names them. Adam ignores SGD's and the other way round."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Of an aggregator. machine: tells who shares memory with it; path: of its Unix socket there."""

    aggregator: str
    host: str
    port: int
    machine: str
    path: str


class JobSpec(msgspec.Struct, frozen=True):
    """What does not change while a job lives. extras: tensors that are not trained but belong in a version's file.

    optimizer: "sgd", "adam", "adamw", or "sum", which adds gradients up and has no parameters of its own.
    gradients: dtype on the wire. average: divide the sum by the number of workers. snapshot_every: steps that a failure
    may cost; 0: nothing is saved.
    momentum: whether SGD keeps a momentum buffer. amsgrad: whether Adam keeps the largest second moment.
    loss_limit: share of its iteration time that a job may lose by sharing. workers: with how many it starts.
    min_workers: with fewer it waits for others.
    """

    job: str
    tensors: tuple[TensorSpec, ...]
    optimizer: str
    block_elements: int
    extras: tuple[TensorSpec, ...] = ()
    gradients: str = "float32"
    average: bool = True
    momentum: bool = False
    amsgrad: bool = False
    snapshot_every: int = 0
    loss_limit: float = 0.1
    workers: int = 1
    min_workers: int = 1


# Between an agent and an aggregator.


class Join(msgspec.Struct, tag="join", frozen=True):
    """A worker comes, or comes again: with its staging segment's file descriptor where memory is shared.

    token: the job's secret. incarnation: tells a worker from its predecessor of the same rank.
    """

    job: str
    token: str
    rank: int
    incarnation: str
    epoch: int
    shared: bool


class Hosted(msgspec.Struct, frozen=True, array_like=True):
    """memory: names the segment that holds the block; who has mapped that one need not map it again."""

    block: int
    applied: int
    memory: str


class Joined(msgspec.Struct, tag="joined", frozen=True):
    """Blocks of the job that are here and complete, each with its segment's file descriptor where memory is shared.

    Sent again when more have become so.
    """

    job: str
    epoch: int
    blocks: tuple[Hosted, ...]


class Push(msgspec.Struct, tag="push", frozen=True):
    """A block's gradient, in the job's wire dtype, follows as payload. Replaces an earlier one of the same step."""

    job: str
    epoch: int
    step: int
    block: int


class Pushed(msgspec.Struct, tag="pushed", frozen=True):
    """All pushes that came before `Flush` on this connection are staged."""

    job: str
    step: int


class Flush(msgspec.Struct, tag="flush", frozen=True):
    job: str
    step: int


class Commit(msgspec.Struct, tag="commit", frozen=True):
    """This worker's gradients of the step are staged, everywhere if it is not alone. blocks: None for all that the
    aggregator has of the job; moved ones included. scale: what its gradients are multiplied with. skip: the step is to
    change nothing (a gradient overflowed). version: the parameters after this step become a version of this name.
    """

    job: str
    epoch: int
    step: int
    groups: tuple[Hyperparameters, ...]
    blocks: tuple[int, ...] | None = None
    scale: float = 1.0
    skip: bool = False
    version: str | None = None


class Applied(msgspec.Struct, tag="applied", frozen=True):
    """These blocks have seen the step. skipped: and were left as they were. Through TCP one `Parameters` a block comes
    instead, if the worker does not say that it needs none.
    """

    job: str
    step: int
    blocks: tuple[int, ...]
    skipped: bool = False


class Parameters(msgspec.Struct, tag="parameters", frozen=True):
    """The block's fp32 parameters after the step follow as payload."""

    job: str
    step: int
    block: int
    skipped: bool = False


class Moved(msgspec.Struct, tag="moved", frozen=True):
    """From the step after this one on, these blocks are at another aggregator. Comes with the answer to the step, or by
    itself where nobody has committed the next one. Who has sent a commit meanwhile sends it again, to the new owner.
    """

    job: str
    epoch: int
    step: int
    blocks: tuple[int, ...]
    to: Address


class AskNorms(msgspec.Struct, tag="ask_norms", frozen=True):
    """This worker's gradients are staged: the squared norm of each block's sum is asked for, when all workers ask."""

    job: str
    epoch: int
    step: int
    scale: float = 1.0


class Norms(msgspec.Struct, tag="norms", frozen=True):
    """blocks: (block, squared Euclidean norm of the gradient as it will be applied)."""

    job: str
    step: int
    blocks: tuple[tuple[int, float], ...]


class Extra(msgspec.Struct, tag="extra", frozen=True):
    """A tensor that is not trained (a buffer, a frozen parameter) follows as payload, in its own dtype, for the file of
    the version that the parameters become after `step`. tensor: its place in `JobSpec.extras`. Sent again until there
    is an answer.
    """

    job: str
    epoch: int
    version: str
    step: int
    tensor: int


class ExtraTaken(msgspec.Struct, tag="extra_taken", frozen=True):
    """It is in the file; or it cannot be, and the master was told why."""

    job: str
    version: str
    tensor: int


class Read(msgspec.Struct, tag="read", frozen=True):
    """part: "parameters" or a state's name as torch.optim calls it ("exp_avg", ...)."""

    job: str
    block: int
    part: str


class Contents(msgspec.Struct, tag="contents", frozen=True):
    """What was read follows as payload: fp32."""

    job: str
    block: int
    part: str
    applied: int
    updates: int


class Write(msgspec.Struct, tag="write", frozen=True):
    """What follows as payload replaces a part of a block at a step boundary. complete: this was the block's last part,
    which from now on is at step `applied` and has seen so many updates.
    """

    job: str
    epoch: int
    block: int
    part: str
    applied: int
    complete: bool
    updates: int = 0


class Written(msgspec.Struct, tag="written", frozen=True):
    job: str
    block: int
    part: str


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """code: one of wire.refusals. What it refuses has had no effect."""

    job: str
    code: str
    message: str
    step: int = 0
    blocks: tuple[int, ...] = ()


# Between two aggregators.


class Expect(msgspec.Struct, tag="expect", frozen=True):
    """Blocks will be handed over: workers that are told so may come before their states. Where memory is shared the
    descriptors of their segments come with it, so that they can be mapped in time. key: of the service.
    members, token: of the job. kept: as in `Kept`.
    """

    key: str
    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    blocks: tuple[int, ...]
    kept: int = 0


class Expecting(msgspec.Struct, tag="expecting", frozen=True):
    job: str
    epoch: int
    blocks: tuple[int, ...]


class Adopt(msgspec.Struct, tag="adopt", frozen=True):
    """From now on the receiver owns an expected block. Where memory is not shared its state follows as payload."""

    job: str
    epoch: int
    block: int
    applied: int
    updates: int
    memory: str


class Adopted(msgspec.Struct, tag="adopted", frozen=True):
    job: str
    epoch: int
    block: int


Data = (
    Join | Joined | Push | Flush | Pushed | Commit | Applied | Parameters | Moved | AskNorms | Norms | Extra
    | ExtraTaken | Read | Contents | Write | Written | Refused | Expect | Expecting | Adopt | Adopted
)  # fmt: skip


# Between an agent and the master.


class Enlist(msgspec.Struct, tag="enlist", frozen=True):
    """A worker wants to take part in a job, which begins with the first that comes. rank: None to be given one."""

    spec: JobSpec
    token: str
    rank: int | None
    incarnation: str
    machine: str


class Placement(msgspec.Struct, tag="placement", frozen=True):
    """What holds from now on. owners: place in `addresses` of each block's owner.

    applied: the step from which the job goes on; one before that which a worker is in loses nothing, and a smaller one
    means that it was rolled back. lost: steps that were. initialise: this worker brings the first parameters.
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
    reason: str = ""


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
    """This worker has lost that aggregator and cannot connect to it any more."""

    job: str
    rank: int
    epoch: int
    aggregator: str
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


# Between an aggregator and the master.


class BlockState(msgspec.Struct, frozen=True, array_like=True):
    block: int
    applied: int


class HostedJob(msgspec.Struct, frozen=True):
    """spec and token let a master that has lost its log take the job up again."""

    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    blocks: tuple[BlockState, ...]


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


class Host(msgspec.Struct, tag="host", frozen=True):
    """From this epoch on own exactly these blocks of the job, all at step `applied`, with these members.

    source: "keep" what is there; "worker": one will write them; otherwise the snapshot's file that they are read from.
    Other blocks of the job are forgotten, unfinished moves too. kept: as in `Kept`.
    """

    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    blocks: tuple[int, ...]
    applied: int
    source: str
    kept: int = 0


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
    """blocks: that are complete here, those whose move was announced but not accepted included."""

    job: str
    epoch: int
    blocks: tuple[BlockState, ...]
    commits: tuple[HeldCommit, ...]


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
    aggregator that is connected to the master applies none further behind the last complete snapshot.
    """

    job: str
    step: int


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Forget the job. Its files stay."""

    job: str


class WorkerLost(msgspec.Struct, tag="worker_lost", frozen=True):
    """The connection to this worker ended without its leave."""

    job: str
    rank: int
    incarnation: str


class Saved(msgspec.Struct, tag="saved", frozen=True):
    """These blocks of a snapshot ("") or a version are in its file, and these extras of a version."""

    job: str
    version: str
    step: int
    path: str
    blocks: tuple[int, ...] = ()
    extras: tuple[int, ...] = ()


class JobUsage(msgspec.Struct, frozen=True):
    """Since the last report. cpu: seconds of the compute thread; steps: how many; late: seconds past the deadlines,
    summed. cpu_per_block: seconds a step, smoothed.
    """

    job: str
    cpu: float
    steps: int
    late: float
    memory: int
    network: int
    cpu_per_block: tuple[tuple[int, float], ...]


class Usage(msgspec.Struct, tag="usage", frozen=True):
    """seconds: since the last report. busy: of the compute thread. cpu: of the whole process."""

    aggregator: str
    seconds: float
    busy: float
    cpu: float
    memory: int
    jobs: tuple[JobUsage, ...]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """An order could not be carried out."""

    job: str
    epoch: int
    order: str
    message: str


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the process: nothing is here any more."""


ToMaster = (
    Enlist | Progress | Unreachable | Leave | Register | Ready | MovedOut | Held | WorkerLost | Saved | Usage | Failed
)  # fmt: skip
FromMaster = Placement | Denied | Registered | Host | Move | Hold | Complete | Kept | Drop | Stop


def encoder() -> msgspec.msgpack.Encoder:
    return msgspec.msgpack.Encoder()


def decoder(union: Any) -> msgspec.msgpack.Decoder[Any]:
    """Of Data, ToMaster or FromMaster. Its `decode` raises msgspec.ValidationError on anything else."""
    return msgspec.msgpack.Decoder(union)
