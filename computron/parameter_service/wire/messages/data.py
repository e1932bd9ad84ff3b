"""Between agents and aggregators, and between two aggregators: gradients, parameters, states."""

from __future__ import annotations

import msgspec

from computron.parameter_service.wire.messages.jobs import Address, Hyperparameters, JobSpec


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
    instead.
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
    """This worker's gradients are staged: the squared norm of each block's sum is asked for, when all workers ask.

    time: of this step; the norms may be asked for again when the gradients are others. Asked once more for the same
    time it is answered once more.
    """

    job: str
    epoch: int
    step: int
    scale: float = 1.0
    time: int = 1


class Norms(msgspec.Struct, tag="norms", frozen=True):
    """blocks: (block, squared Euclidean norm of the gradient as it will be applied)."""

    job: str
    step: int
    blocks: tuple[tuple[int, float], ...]
    time: int = 1


class Extra(msgspec.Struct, tag="extra", frozen=True):
    """A tensor that is not trained (a buffer, a frozen parameter) follows as payload, in its own dtype, for the file of
    the version that the parameters become after `step`. tensor: its place in `JobSpec.extras`. Sent again where
    the answer is lost with the link or the epoch.
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
    members, token: of the job. kept: as `Kept.step`. history: as in `Saved`. pushing: how many of the members will push
    their gradients, at most.
    """

    key: str
    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    blocks: tuple[int, ...]
    kept: int | None = 0
    history: int = 0
    pushing: int = 0


class Expecting(msgspec.Struct, tag="expecting", frozen=True):
    job: str
    epoch: int
    blocks: tuple[int, ...]


class Adopt(msgspec.Struct, tag="adopt", frozen=True):
    """From now on the receiver owns an expected block. Where memory is not shared its state follows as payload.
    kept: as `Kept.step`, as far as the sender has heard.
    """

    job: str
    epoch: int
    block: int
    applied: int
    updates: int
    memory: str
    kept: int | None = 0


class Adopted(msgspec.Struct, tag="adopted", frozen=True):
    job: str
    epoch: int
    block: int


Data = (
    Join | Joined | Push | Flush | Pushed | Commit | Applied | Parameters | Moved | AskNorms | Norms | Extra
    | ExtraTaken | Read | Contents | Write | Written | Refused | Expect | Expecting | Adopt | Adopted
)  # fmt: skip
