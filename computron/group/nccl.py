"""Tensors between nodes with GPUs: NCCL process groups, without a global one.

The host does not wait: operations make the compute stream wait, and the host may hear of a broken group only when it
looks at results. After `abort` the GPU's work ends and its results mean nothing; `settle` tells.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from computron.group.rendezvous import Meeting

_LONGEST = timedelta(hours=24)  # that an operation may take: a stage may wait for a swap-in of the one before it
_LOOK = 0.0001  # seconds between two looks at the device


def connect_nccl(meeting: Meeting, device: torch.device) -> NcclLinks:
    """Meet the other nodes and connect. The leader opens a store through which NCCL's own addresses are told."""
    # The watchdog would end the process when another node has died; here the group is formed anew instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    shard = meeting.shard
    timeout = timedelta(seconds=meeting.remaining)
    if shard.rank == 0:
        store = TCPStore(meeting.host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        meeting.exchange(store.port)
    else:
        port = meeting.exchange(0).nodes[0].port
        store = TCPStore(meeting.host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    links = NcclLinks(shard.tensor_rank, shard.tensor_parallel, store, device)
    try:
        if shard.tensor_parallel > 1:
            links.stage = _group(store, f"stage/{shard.stage}", shard.tensor_rank, shard.tensor_parallel, device)
        if not shard.first:
            links.before = _group(store, f"link/{shard.stage - 1}/{shard.tensor_rank}", 1, 2, device)
        if not shard.last:
            links.after = _group(store, f"link/{shard.stage}/{shard.tensor_rank}", 0, 2, device)
    except BaseException:
        links.abort()
        raise
    return links


def _group(store: Store, name: str, rank: int, size: int, device: torch.device) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _LONGEST
    group = dist.ProcessGroupNCCL(PrefixStore(name, store), rank, size, options)
    group.eager_connect_single_device(device)
    return group


class NcclLinks:
    """`stage`: the process group of the stage's nodes; `before` and `after`: of two nodes each; the first one sends."""

    def __init__(self, tensor_rank: int, tensor_parallel: int, store: Store, device: torch.device) -> None:
        self._store = store
        self._device = device
        self.stage: Any = None
        self.before: Any = None
        self.after: Any = None
        self._rank = tensor_rank
        self._nodes = tensor_parallel
        self._sending: deque[tuple[Any, Tensor]] = deque()  # what is under way, with its memory
        self._aborted = False

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
            if self._aborted:
                raise ConnectionAbortedError("the epoch was ended")
            time.sleep(_LOOK)

    def abort(self) -> None:
        self._aborted = True
        for group in (self.stage, self.before, self.after):
            if group is not None:
                threading.Thread(target=group.abort, name="abort-nccl", daemon=True).start()
