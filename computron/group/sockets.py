"""Tensors between nodes without GPUs: one TCP connection for each pair of nodes that talk to each other.

A step makes dozens of exchanges of a few kilobytes, so latency is what counts. An exchange is one system call to send
and one to receive for each peer, made by the thread that needs the result; gloo hands each operation through three
threads, takes many times as long, and an operation whose peer hangs can only be left behind with its threads. No
operation has a timeout: `abort` shuts the connections, which wakes whoever waits at either end. It comes by itself when
the network has taken nothing for a while (`watch`), however long the other node computes.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from computron.group.paths import PathWatch

log = logging.getLogger(__name__)

WHOLE = 128 << 10  # bytes up to which more than two nodes reduce by sending everything to everyone
KEPT = 64  # sizes of small tensors whose buffers are kept

View = memoryview


class SocketLinks:
    """`stage`: connections to the other nodes of the stage by tensor_rank; `before` and `after`: to the neighbours in
    the stages around. One thread at a time communicates; `abort` may come from any. OSError: a connection has ended.
    """

    def __init__(
        self,
        tensor_rank: int,
        stage: Mapping[int, socket.socket],
        before: socket.socket | None = None,
        after: socket.socket | None = None,
    ) -> None:
        self._rank = tensor_rank
        self._nodes = len(stage) + 1
        self._stage = dict(sorted(stage.items()))
        self._before = before
        self._after = after
        self._outbox = None if after is None else Outbox(after)
        self._buffers: OrderedDict[tuple[int, torch.dtype], _Buffers] = OrderedDict()
        self._using = threading.Lock()
        self._watch: PathWatch | None = None

    def watch(self, timeout: float) -> None:
        """End all connections if the network takes nothing on one of them for so many seconds."""

        def dead() -> None:
            log.error("network_silent seconds=%.1f", timeout)
            for connection in self._connections():
                with suppress(OSError):  # what is unsent shall not hold up the news of the end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.abort()

        self._watch = PathWatch(self._connections(), timeout, dead)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Summed in the order of ranks, float16 and bfloat16 in float32 and rounded once."""
        result = tensor.detach().contiguous()
        flat = result.view(-1)
        with self._using:
            if self._nodes == 2 or flat.nbytes <= WHOLE:
                self._reduce_whole(flat)
            else:
                self._reduce_in_slices(flat)
        return result

    def _reduce_whole(self, flat: Tensor) -> None:
        """Everyone sends all it has to everyone and sums by itself."""
        buffers = self._buffers_for(flat)
        mine = view_of(flat)
        self._exchange(dict.fromkeys(self._stage, mine), buffers.views)
        buffers.parts[self._rank] = flat
        sum_in_order(buffers.parts, flat)
        buffers.parts[self._rank] = buffers.none

    def _reduce_in_slices(self, flat: Tensor) -> None:
        """Everyone sums one slice of everybody's tensors and sends the sum to everyone."""
        nodes, size = self._nodes, flat.numel()
        bounds = [size * node // nodes for node in range(nodes + 1)]
        slices = [flat[start:end] for start, end in pairwise(bounds)]
        views = [view_of(part) for part in slices]
        own = slices[self._rank]
        parts = [own if node == self._rank else torch.empty_like(own) for node in range(nodes)]
        self._exchange(
            {node: views[node] for node in self._stage}, {node: view_of(parts[node]) for node in self._stage}
        )
        sum_in_order(parts, own)
        self._exchange(dict.fromkeys(self._stage, views[self._rank]), {node: views[node] for node in self._stage})

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        own = tensor.detach().contiguous()
        rows = own.shape[:-1]
        parts = [own if node == self._rank else own.new_empty((*rows, size)) for node, size in enumerate(sizes)]
        with self._using:
            self._exchange(
                dict.fromkeys(self._stage, view_of(own.view(-1))),
                {node: view_of(parts[node].view(-1)) for node in self._stage},
            )
        return torch.cat(parts, dim=-1)

    def send(self, tensor: Tensor) -> None:
        assert self._outbox is not None, "the last stage has nobody to send to"
        with self._using:
            self._outbox.send(view_of(tensor.detach().contiguous().view(-1)))

    def receive(self, like: Tensor) -> Tensor:
        assert self._before is not None, "the first stage has nobody to receive from"
        result = torch.empty(like.shape, dtype=like.dtype)
        with self._using:
            receive_into(self._before, view_of(result.view(-1)))
        return result

    def settle(self) -> None:
        """Results are there when operations return."""

    def abort(self) -> None:
        """Whoever waits at either end gets an OSError now. The connections are closed when no thread uses them."""
        if self._watch is not None:
            self._watch.close()
        for connection in self._connections():
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended already
        threading.Thread(target=self._close, name="close-links", daemon=True).start()

    def _close(self) -> None:
        if self._outbox is not None:
            self._outbox.end()
        with self._using:
            for connection in self._connections():
                connection.close()

    def _connections(self) -> Iterable[socket.socket]:
        yield from self._stage.values()
        for connection in (self._before, self._after):
            if connection is not None:
                yield connection

    def _exchange(self, outgoing: Mapping[int, View], incoming: Mapping[int, View]) -> None:
        """Send to and receive from each node of the stage. What does not fit the kernel's buffers goes out while things
        come in, so that nodes never wait for each other to read.
        """
        unsent = {}
        for node, connection in self._stage.items():
            view = outgoing[node]
            sent = send_now(connection, view)
            if sent < len(view):
                unsent[node] = view[sent:]
        if unsent:
            self._exchange_both_ways(unsent, dict(incoming))
            return
        for node, connection in self._stage.items():
            receive_into(connection, incoming[node])

    def _exchange_both_ways(self, outgoing: dict[int, View], incoming: dict[int, View]) -> None:
        incoming = {node: view for node, view in incoming.items() if len(view)}
        nodes = {self._stage[node].fileno(): node for node in outgoing.keys() | incoming.keys()}
        poll = select.poll()

        def watch(node: int) -> None:
            wanted = (select.POLLOUT if node in outgoing else 0) | (select.POLLIN if node in incoming else 0)
            if wanted:
                poll.register(self._stage[node], wanted)
            else:
                poll.unregister(self._stage[node])

        for node in nodes.values():
            watch(node)
        while outgoing or incoming:
            for number, events in poll.poll():
                node = nodes[number]
                connection = self._stage[node]
                if events & select.POLLOUT and node in outgoing:
                    view = outgoing[node]
                    left = view[send_now(connection, view) :]
                    _advance(outgoing, node, left)
                if events & ~select.POLLOUT and node in incoming:
                    _advance(incoming, node, incoming[node][receive_some(connection, incoming[node]) :])
                elif events & (select.POLLHUP | select.POLLERR):
                    raise ConnectionResetError("the connection has ended")
                watch(node)

    def _buffers_for(self, flat: Tensor) -> _Buffers:
        """Where to receive others' tensors like this one; small ones are kept."""
        key = flat.numel(), flat.dtype
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = _Buffers(flat, self._stage, self._nodes)
            if flat.nbytes <= WHOLE:
                self._buffers[key] = buffers
                if len(self._buffers) > KEPT:
                    self._buffers.popitem(last=False)
        return buffers


class _Buffers:
    def __init__(self, flat: Tensor, others: Iterable[int], nodes: int) -> None:
        self.none = flat.new_empty(0)
        self.parts = [self.none] * nodes  # by tensor_rank; the own one is put in and out
        for node in others:
            self.parts[node] = torch.empty_like(flat)
        self.views = {node: view_of(self.parts[node]) for node in others}


class Outbox:
    """Sends views one after the other without making the sender wait: what the kernel does not take at once is sent by
    a thread of its own. After the connection has ended, everything is dropped; the next `send` raises OSError.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._views: deque[View] = deque()  # the first is being sent
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def send(self, view: View) -> None:
        with self._changed:
            if self._error is not None:
                raise ConnectionResetError(str(self._error)) from self._error
            if not self._views:
                view = view[send_now(self._connection, view) :]
                if not len(view):
                    return
            self._views.append(view)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="send-to-next-stage", daemon=True)
                self._thread.start()
            self._changed.notify()

    def end(self) -> None:
        """Wait for the thread, whose connection must have been shut."""
        with self._changed:
            self._error = self._error or ConnectionAbortedError("the connection was closed here")
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._views and self._error is None:
                    self._changed.wait()
                if self._error is not None:
                    self._views.clear()
                    return
                view = self._views[0]
            try:
                self._connection.sendall(view)
            except OSError as error:
                with self._changed:
                    self._error = self._error or error
                continue
            with self._changed:
                self._views.popleft()


def view_of(flat: Tensor) -> View:
    """The bytes of a dense tensor of one dimension."""
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def send_now(connection: socket.socket, view: View) -> int:
    """How many bytes the kernel took at once."""
    try:
        return connection.send(view, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 0


def receive_some(connection: socket.socket, view: View, flags: int = 0) -> int:
    received = connection.recv_into(view, 0, flags)
    if not received:
        raise ConnectionResetError("the other node has ended the connection")
    return received


def receive_into(connection: socket.socket, view: View) -> None:
    """Wait until the view is full."""
    while len(view):
        view = view[receive_some(connection, view, socket.MSG_WAITALL) :]


def sum_in_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """The sum of two or more tensors, always in this order, into `out`, which may be one of them. Half precision is
    summed in float32.
    """
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)
        return
    wide = torch.float32 if out.dtype in (torch.float16, torch.bfloat16) else out.dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)


def _advance(views: dict[int, View], node: int, left: View) -> None:
    if len(left):
        views[node] = left
    else:
        del views[node]
