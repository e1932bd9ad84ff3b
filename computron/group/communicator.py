"""What the parts of a model on several nodes say to each other during a forward, and how that begins and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from computron.errors import GroupBroken
from computron.group.connecting import connect_sockets
from computron.group.nccl import NcclHangs, connect_nccl
from computron.group.rendezvous import Meeting, Store, make_store
from computron.models.shard import Shard

__all__ = ["GroupCommunicator", "Store", "make_store"]

_LOOK = 0.05  # seconds between two looks whether a meeting was given up


class Links(Protocol):
    """Connections to the nodes that this one talks to, for one epoch. OSError or RuntimeError: one has ended."""

    def all_reduce(self, tensor: Tensor) -> Tensor: ...

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor: ...

    def send(self, tensor: Tensor) -> None: ...

    def receive(self, like: Tensor) -> Tensor: ...

    def settle(self) -> None: ...

    def abort(self) -> None:
        """From any thread, at once: whoever waits, here or at the other ends, gets an error."""


class GroupCommunicator:
    """A node's Communicator. `form` connects it to the other nodes for one epoch, `abort` ends that.

    Operations run on one thread at a time, every node of a stage making the same ones in the same order; `form`,
    `abort` and `close` may be called from any. Between CPUs, all_reduce adds in the order of tensor ranks, half
    precision in float32 rounded once, so that all nodes get the same bits whatever the size. Between GPUs NCCL adds, in
    its own order, which gives all nodes the same bits too. No operation has a timeout: a stage may wait for minutes for
    the stage before it to swap a model in. A peer that dies breaks the epoch at once; one that hangs does not, until
    someone calls `abort`.
    """

    def __init__(self, shard: Shard, device: torch.device | str = "cpu") -> None:
        self._shard = shard
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._links: Links | None = None
        self._left: Links | None = None  # of this epoch: other nodes may still receive what was sent on them
        self._attempt: _Attempt | None = None
        self._epoch = -1  # the latest that was to be formed
        self._why = "the group has not been formed yet"
        self._closed = False

    def form(self, epoch: int, host: str, port: int, timeout: float) -> None:
        """Connect to the other nodes, which all call this with the same arguments: `host` and `port` are those of the
        store that the leader has made for this epoch. Ends the epoch before, or another attempt that still waits.

        Raises GroupBroken, saying who is missing where that is known, after `timeout` seconds or on `abort`; at once,
        and changing nothing, if a later epoch has been called for: threads may come here out of order. Raises NcclHangs
        if this process has to end before it can be part of a group.
        """
        if self._shard.whole:
            return
        with self._lock:
            if self._closed:
                raise GroupBroken("the communicator is closed")
            if epoch < self._epoch:
                raise GroupBroken(f"epoch {epoch} is over: epoch {self._epoch} was called for since")
            self._epoch = epoch
            reason = f"epoch {epoch} is being formed"
            before = self._take(reason)
            attempt = self._attempt = _Attempt(Meeting(self._shard, epoch, host, port, timeout), self._device)
        _end(*before, reason)
        try:
            links = attempt.wait(timeout)
        except (GroupBroken, NcclHangs) as error:
            with self._lock:
                if self._attempt is attempt:
                    self._attempt, self._why = None, str(error)
            raise
        with self._lock:
            current = self._attempt is attempt
            if current:
                self._attempt, self._links = None, links
        if not current:
            links.abort()
            raise GroupBroken(f"epoch {epoch} was aborted while it formed")

    def abort(self, reason: str = "the group was aborted") -> None:
        """End the epoch, or the attempt to form one. Whoever waits in an operation or in `form`, here or on another
        node, raises GroupBroken; so does every later operation here until the next `form`. Returns at once.
        """
        with self._lock:
            before = self._take(reason)
        _end(*before, reason)

    def leave(self, reason: str) -> None:
        """Have no further part in the epoch. Every later operation here raises GroupBroken; what was sent before still
        arrives, and whoever waits for this node does so until `abort`. From the thread that makes the operations.
        """
        with self._lock:
            if self._links is not None:
                self._left, self._links, self._why = self._links, None, reason

    def _take(self, reason: str) -> tuple[Links | None, _Attempt | None]:
        """What there is to be ended. The lock must be held."""
        before = self._links or self._left, self._attempt
        self._links = self._left = self._attempt = None
        if before != (None, None):
            self._why = reason
        return before

    def close(self) -> None:
        """Abort for good."""
        with self._lock:
            self._closed = True
        self.abort("the communicator is closed")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._shard.tensor_parallel == 1:
            return tensor
        links = self._links
        if links is None:
            raise GroupBroken(self._why)
        try:
            return links.all_reduce(tensor)
        except (OSError, dist.DistError) as error:
            raise self._broken(links, error) from error

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        if len(sizes) != self._shard.tensor_parallel or tensor.shape[-1] != sizes[self._shard.tensor_rank]:
            raise ValueError(f"the parts of {self._shard} cannot have the sizes {sizes} and {tensor.shape} here")
        if self._shard.tensor_parallel == 1:
            return tensor
        links = self._formed()
        try:
            return links.all_gather(tensor, sizes)
        except (OSError, dist.DistError) as error:
            raise self._broken(links, error) from error

    def send(self, tensor: Tensor) -> None:
        links = self._formed()
        try:
            links.send(tensor)
        except (OSError, dist.DistError) as error:
            raise self._broken(links, error) from error

    def receive(self, like: Tensor) -> Tensor:
        links = self._formed()
        try:
            return links.receive(like)
        except (OSError, dist.DistError) as error:
            raise self._broken(links, error) from error

    def settle(self) -> None:
        """Wait until the device has done what it was asked to. Raises GroupBroken if the epoch has ended: what the
        device computed last means nothing then.
        """
        if self._shard.whole:
            return
        links = self._formed()
        try:
            links.settle()
        except (OSError, dist.DistError) as error:
            raise self._broken(links, error) from error
        self._formed()

    def _formed(self) -> Links:
        links = self._links
        if links is None:
            raise GroupBroken(self._why)
        return links

    def _broken(self, links: Links, error: Exception) -> GroupBroken:
        """The error to raise when `links` raised this one; ends their epoch if it has not ended."""
        with self._lock:
            if self._links is links:
                self._links = None
                self._why = f"the connection to another node broke: {error}"
                ours = True
            else:
                ours = False
            why = self._why
        if ours:
            links.abort()
        return GroupBroken(why)


def _end(links: Links | None, attempt: _Attempt | None, reason: str) -> None:
    if attempt is not None:
        attempt.give_up(reason)
    if links is not None:
        links.abort()


class _Attempt:
    """One attempt to make links, in a thread of its own, since not all of it can be interrupted."""

    def __init__(self, meeting: Meeting, device: torch.device) -> None:
        self._meeting = meeting
        self._device = device
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._links: Links | None = None
        self._error: Exception | None = None
        self._reason: str | None = None  # why it was given up
        threading.Thread(target=self._run, name="form-group", daemon=True).start()

    def wait(self, timeout: float) -> Links:
        """The links. Raises GroupBroken if there are none after so many seconds, or if the attempt is given up."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not self._meeting.given_up:
            if self._ended.wait(_LOOK):
                break
        self.give_up("")
        with self._lock:
            links, error, reason = self._links, self._error, self._reason
        if links is not None:
            return links
        if isinstance(error, GroupBroken | NcclHangs):
            raise error
        problem = reason or self._meeting.doing + (f" ({error})" if error is not None else "")
        raise GroupBroken(f"epoch {self._meeting.epoch} was not formed: {problem}") from error

    def give_up(self, reason: str) -> None:
        """End it if it goes on. `reason`: in words; "": it is late."""
        with self._lock:
            if self._reason is None and not self._ended.is_set():
                self._reason = reason
                self._meeting.give_up()
                self._ended.set()

    def _run(self) -> None:
        links: Links | None = None
        error: Exception | None = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # NCCL makes threads and memory on the current one
                links = connect_nccl(self._meeting, self._device)
            else:
                links = connect_sockets(self._meeting)
        except Exception as raised:
            error = raised
        with self._lock:
            late = self._ended.is_set()
            if not late:
                self._links, self._error = links, error
                self._ended.set()
        if late and links is not None:
            links.abort()
