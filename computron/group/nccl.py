"""Tensors between nodes with GPUs: NCCL process groups, without a global one.

The host does not wait: operations make the compute stream wait, and the host may hear of a broken group only when it
looks at results. After `abort` the GPU's work ends and its results mean nothing; `settle` tells.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from computron.group.connecting import connect
from computron.group.pulse import Pulse
from computron.group.rendezvous import Meeting

_LONGEST = timedelta(hours=24)  # that an operation may take: a stage may wait for a swap-in of the one before it
_LOOK = 0.0001  # seconds between two looks at the device
_GATE_LOOK = 0.005  # seconds between two looks at who has come
STUCK_LIMIT = 3  # attempts that may hang within NCCL, each with a thread and memory, before there are no more


def connect_nccl(meeting: Meeting, device: torch.device) -> NcclLinks:
    """Meet the other nodes and connect. The leader opens a store through which NCCL's own addresses are told."""
    # The watchdog would end the process when another node has died; here the group is formed anew instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    if _initializing.count >= STUCK_LIMIT:
        raise NcclHangs(f"{_initializing.count} attempts to form the group hang within NCCL: this process must end")
    shard = meeting.shard
    links = NcclLinks(shard.tensor_rank, shard.tensor_parallel, device)
    try:
        store = links.meet(meeting)
        if shard.tensor_parallel > 1:
            name = f"stage/{shard.stage}"
            links.stage = links.add(_group(store, name, shard.tensor_rank, shard.tensor_parallel, device, meeting))
        if not shard.first:
            name = f"link/{shard.stage - 1}/{shard.tensor_rank}"
            links.before = links.add(_group(store, name, 1, 2, device, meeting))
        if not shard.last:
            name = f"link/{shard.stage}/{shard.tensor_rank}"
            links.after = links.add(_group(store, name, 0, 2, device, meeting))
    except BaseException:
        links.abort()
        raise
    return links


def _group(store: Store, name: str, rank: int, size: int, device: torch.device, meeting: Meeting) -> Any:
    """NCCL's own meeting cannot be interrupted: in its blocking mode a communicator can be aborted once it is made, and
    each operation takes a thread of its own in the other mode. So this begins when all are about to begin.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _LONGEST
    own = PrefixStore(name, store)
    group = dist.ProcessGroupNCCL(own, rank, size, options)
    await_all(own, rank, size, meeting)
    with _initializing:
        group.eager_connect_single_device(device)
    return group


def await_all(store: Store, rank: int, size: int, meeting: Meeting) -> None:
    """Wait until this has been called with all ranks below `size`. Raises GroupBroken as the meeting says."""
    meeting.doing = "NCCL has not connected the nodes"
    store.set(f"here/{rank}", "")
    everyone = [f"here/{other}" for other in range(size)]
    while not store.check(everyone):
        time.sleep(min(_GATE_LOOK, meeting.remaining))


class NcclHangs(Exception):
    """NCCL has not come back from attempts that were given up; this process cannot be one of a group any more."""


class _Counter:
    """How many threads are within."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.count -= 1


_initializing = _Counter()


class NcclLinks:
    """`stage`: the process group of the stage's nodes; `before` and `after`: of two nodes each; the first one sends."""

    def __init__(self, tensor_rank: int, tensor_parallel: int, device: torch.device) -> None:
        self._device = device
        self._store: Store | None = None
        self._groups: list[Any] = []  # not aborted
        self.stage: Any = None
        self.before: Any = None
        self.after: Any = None
        self._rank = tensor_rank
        self._nodes = tensor_parallel
        self._sending: deque[tuple[Any, Tensor]] = deque()  # what is under way, with its memory
        self._pulse: Pulse | None = None
        self._aborted: str | None = None  # why

    def meet(self, meeting: Meeting) -> Store:
        """Meet the other nodes; the store that they share, which is the leader's."""
        timeout = timedelta(seconds=meeting.remaining)
        if meeting.shard.rank == 0:
            store = TCPStore(meeting.host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            _, pulses = connect(meeting, store.port)
            self.watch(pulses, meeting)
        else:
            met, pulses = connect(meeting)
            self.watch(pulses, meeting)
            port = met.nodes[0].store_port
            store = TCPStore(meeting.host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._store = store
        return store

    def watch(self, pulses: Mapping[int, socket.socket], meeting: Meeting) -> None:
        """Abort when one of these connections ends or the meeting is given up. NCCL may not notice that another node
        has died or is out of reach.
        """
        meeting.when_given_up(self.abort)

        def lost(reason: str) -> None:
            self.abort(reason)
            meeting.doing = reason
            meeting.give_up()

        self._pulse = Pulse(pulses, lost)

    def add(self, group: Any) -> Any:
        """The group, which `abort` will end."""
        self._groups.append(group)
        return group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        result = tensor.contiguous()
        self.stage.allreduce([result]).wait()
        return result

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every part is sent as wide as the widest."""
        width = max(sizes)
        own = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1])).contiguous()
        gathered = own.new_empty((self._nodes, *own.shape))
        self.stage._allgather_base(gathered.view(-1), own.view(-1)).wait()
        return torch.cat([part[..., :size] for part, size in zip(gathered, sizes, strict=True)], dim=-1)

    def send(self, tensor: Tensor) -> None:
        """The compute stream does not wait for it."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        own = tensor.contiguous()
        self._sending.append((self.after.broadcast(own, 0), own))

    def receive(self, like: Tensor) -> Tensor:
        result = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self.before.broadcast(result, 0).wait()
        return result

    def settle(self) -> None:
        """Wait for the device's current stream."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        while not event.query():
            if self._aborted is not None:
                raise ConnectionAbortedError(self._aborted)
            time.sleep(_LOOK)

    def abort(self, reason: str = "the epoch was ended") -> None:
        if self._aborted is None:
            self._aborted = reason
        if self._pulse is not None:
            self._pulse.close()
        while self._groups:
            threading.Thread(target=self._groups.pop().abort, name="abort-nccl", daemon=True).start()
