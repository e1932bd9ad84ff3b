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

from computron.parameter_service.wire.messages.aggregators import (
    FRESH,
    KEEP,
    BlockState,
    Complete,
    Drop,
    Failed,
    Held,
    HeldCommit,
    Hold,
    Host,
    HostedJob,
    JobUsage,
    Keep,
    Kept,
    Move,
    MovedOut,
    Ready,
    Register,
    Registered,
    Saved,
    Stop,
    Usage,
    WorkerLost,
)
from computron.parameter_service.wire.messages.data import (
    Adopt,
    Adopted,
    Applied,
    AskNorms,
    Commit,
    Contents,
    Data,
    Expect,
    Expecting,
    Extra,
    ExtraTaken,
    Flush,
    Hosted,
    Join,
    Joined,
    Moved,
    Norms,
    Parameters,
    Push,
    Pushed,
    Read,
    Refused,
    Write,
    Written,
)
from computron.parameter_service.wire.messages.jobs import (
    Address,
    Hyperparameters,
    JobSpec,
)
from computron.parameter_service.wire.messages.workers import (
    Denied,
    Enlist,
    Leave,
    Load,
    Loaded,
    Placement,
    Progress,
    Unreachable,
)

__all__ = [
    "FRESH",
    "KEEP",
    "VERSION",
    "Address",
    "Adopt",
    "Adopted",
    "Applied",
    "AskNorms",
    "BlockState",
    "Commit",
    "Complete",
    "Contents",
    "Data",
    "Denied",
    "Drop",
    "Enlist",
    "Expect",
    "Expecting",
    "Extra",
    "ExtraTaken",
    "Failed",
    "Flush",
    "FromMaster",
    "Held",
    "HeldCommit",
    "Hold",
    "Host",
    "Hosted",
    "HostedJob",
    "Hyperparameters",
    "JobSpec",
    "JobUsage",
    "Join",
    "Joined",
    "Keep",
    "Kept",
    "Leave",
    "Load",
    "Loaded",
    "Move",
    "Moved",
    "MovedOut",
    "Norms",
    "Parameters",
    "Placement",
    "Progress",
    "Push",
    "Pushed",
    "Read",
    "Ready",
    "Refused",
    "Register",
    "Registered",
    "Saved",
    "Stop",
    "ToMaster",
    "Unreachable",
    "Usage",
    "WorkerLost",
    "Write",
    "Written",
    "decoder",
    "encoder",
]

VERSION = 1  # of the protocol

ToMaster = (
    Enlist | Progress | Unreachable | Leave | Load | Register | Ready | MovedOut | Held | WorkerLost | Saved | Usage
    | Failed
)  # fmt: skip
FromMaster = Placement | Loaded | Denied | Registered | Host | Move | Hold | Complete | Kept | Keep | Drop | Stop


def encoder() -> msgspec.msgpack.Encoder:
    return msgspec.msgpack.Encoder()


def decoder(union: Any) -> msgspec.msgpack.Decoder[Any]:
    """Of Data, ToMaster or FromMaster. Its `decode` raises msgspec.ValidationError on anything else."""
    return msgspec.msgpack.Decoder(union)
