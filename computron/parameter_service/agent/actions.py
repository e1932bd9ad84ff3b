"""What the state machine of a worker's progress orders, and the shell around it carries out."""

from __future__ import annotations

from dataclasses import dataclass

from computron.parameter_service.wire.messages import Address, Commit, Data, Hyperparameters


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a link to this aggregator and keep trying."""

    address: Address


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the link, if there is one, and try no more."""

    aggregator: str


@dataclass(frozen=True, slots=True)
class Send:
    """The payload follows from the message: Push carries the block's gradient, Write its parameters, Join the staging
    segment's descriptor where memory is shared.
    """

    to: str
    message: Data


@dataclass(frozen=True, slots=True)
class Map:
    """Lay the block's segment, whose descriptor came with this `Joined`, where the block is in the flat space."""

    block: int


@dataclass(frozen=True, slots=True)
class Unshare:
    """Go on with a copy of the block's parameters: from now on they come by messages."""

    block: int


@dataclass(frozen=True, slots=True)
class JoinLater:
    """Call `Progress.join` for this aggregator after a moment."""

    aggregator: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The job cannot go on in this worker."""

    code: str
    message: str


Action = Connect | Disconnect | Send | Map | Unshare | JoinLater | Fail


@dataclass(frozen=True, slots=True)
class Wish:
    """A step that the training thread wants to be taken, as in wire.messages.Commit."""

    step: int
    groups: tuple[Hyperparameters, ...]
    scale: float = 1.0
    skip: bool = False
    version: str | None = None

    def commit(self, job: str, epoch: int, blocks: list[int]) -> Commit:
        return Commit(job, epoch, self.step, self.groups, tuple(blocks), self.scale, self.skip, self.version)


@dataclass(slots=True)
class Peer:
    """An aggregator. joined: has answered to Join in this epoch. flushing: the blocks that were pushed before the Flush
    that is on its way, None if none is.
    """

    address: Address
    connected: bool = False
    shared: bool = False
    joined: bool = False
    flushing: set[int] | None = None


@dataclass(slots=True)
class BlockState:
    """A block as this worker knows it.

    applied: the step that its parameters here have seen, -1 where they are not the job's. hosted: the owner has it and
    knows us. memory: the name of the segment that is mapped, None for memory of our own. staged: the step whose
    gradient lies in staging. pushed, placed: that gradient was sent to the owner, and is there. committed: the owner
    was told. filling: parameters of the next step are coming in. written: its first parameters were sent.
    """

    owner: str = ""
    applied: int = -1
    hosted: bool = False
    memory: str | None = None
    staged: int = 0
    pushed: bool = False
    placed: bool = False
    committed: bool = False
    filling: bool = False
    written: bool = False

    def forget_sent(self) -> None:
        self.pushed = self.placed = self.committed = False
