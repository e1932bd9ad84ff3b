"""How the nodes of a group find each other before each epoch: at a meeting place that the leader opens for it.

Frames of JSON behind a u32 length, little-endian. A node says who it is and where it listens; it is told who is missing
whenever that changes, and where all the others listen once all have come.
"""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

import msgspec

from computron.errors import GroupBroken
from computron.models.shard import Shard

_LOOK = 0.05  # seconds between two looks whether an attempt was given up
_FRAME_LIMIT = 1 << 20
_WORLD_LIMIT = 1 << 12


class Arrival(msgspec.Struct):
    """What a node says: it is there, and may be called at `port` of one of the `addresses`, best first.
    `store_port`: where the leader has a store for NCCL.
    """

    epoch: int
    rank: int
    world: int
    addresses: list[str]
    port: int
    store_port: int = 0


class Missing(msgspec.Struct, tag=True):
    """Who has not come."""

    ranks: list[int]


class Complete(msgspec.Struct, tag=True):
    """All nodes by rank, and a secret that only they know."""

    nodes: list[Arrival]
    secret: bytes


_decode_arrival = msgspec.json.Decoder(Arrival).decode
_decode_answer = msgspec.json.Decoder(Missing | Complete).decode


def make_store(host: str) -> tuple[Store, int]:
    """The meeting place of one epoch and its port, made by the leader, whose address is `host`.

    It is there until it is closed or nobody refers to it. It listens on the loopback device if `host` is there, and on
    all devices otherwise.
    """
    listener = listen(host)
    port: int = listener.getsockname()[1]
    return Store(listener), port


class Store:
    def __init__(self, listener: socket.socket) -> None:
        reception = _Reception(listener)
        thread = threading.Thread(target=reception.run, name="rendezvous", daemon=True)
        thread.start()
        self._finalizer = weakref.finalize(self, _stop, reception, thread)

    def close(self) -> None:
        """Whoever waits here is sent away."""
        self._finalizer()


def _stop(reception: _Reception, thread: threading.Thread) -> None:
    reception.stop()
    if thread is not threading.current_thread():
        thread.join(1.0)


class _Reception:
    """Serves the nodes on a thread of its own."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._stopping, self._stop = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._heard: dict[socket.socket, bytes] = {}
        self._arrivals: dict[socket.socket, Arrival] = {}
        self._complete: set[tuple[int, int]] = set()

    def stop(self) -> None:
        with suppress(OSError):
            self._stop.shutdown(socket.SHUT_RDWR)  # is seen even if a forked process has this end too
        self._stop.close()

    def run(self) -> None:
        self._listener.setblocking(False)
        for end in (self._listener, self._stopping):
            self._selector.register(end, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stopping:
                    for end in (self._listener, self._stopping, *self._heard):
                        end.close()
                    self._selector.close()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._hear(key.fileobj)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._heard[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        """A node says who it is, or has gone; strangers are sent away."""
        try:
            heard = connection.recv(1 << 16)
            if not heard or connection in self._arrivals:
                raise ConnectionError("it has gone")
            self._heard[connection] += heard
            frame = _whole(self._heard[connection])
            if frame is None:
                return
            arrival = _decode_arrival(frame)
            if not 0 <= arrival.rank < arrival.world <= _WORLD_LIMIT:
                raise ConnectionError("there is no such rank")
        except BlockingIOError:
            return
        except (OSError, msgspec.MsgspecError):
            self._forget(connection)
            return
        self._arrivals[connection] = arrival
        self._announce(arrival.epoch, arrival.world)

    def _forget(self, connection: socket.socket) -> None:
        arrival = self._arrivals.pop(connection, None)
        del self._heard[connection]
        self._selector.unregister(connection)
        connection.close()
        if arrival is not None:
            self._announce(arrival.epoch, arrival.world)

    def _announce(self, epoch: int, world: int) -> None:
        """Tell those of the epoch who is missing, or that nobody is; of two of the same rank the later one counts."""
        if (epoch, world) in self._complete:
            return
        there = {a.rank: (a, c) for c, a in self._arrivals.items() if (a.epoch, a.world) == (epoch, world)}
        missing = [rank for rank in range(world) if rank not in there]
        answer: Missing | Complete = Missing(missing)
        if not missing:
            self._complete.add((epoch, world))
            answer = Complete([there[rank][0] for rank in range(world)], os.urandom(16))
        for _, connection in there.values():
            with suppress(OSError):  # it has gone, which is about to be heard
                connection.send(_framed(answer))


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port: on the loopback device if `host` is there, on all devices otherwise."""
    address, family, both = "", socket.AF_INET, False
    if is_loopback(host):
        address = "127.0.0.1" if host == "localhost" else host
        family = socket.AF_INET6 if ":" in host else family
    elif socket.has_dualstack_ipv6():
        family, both = socket.AF_INET6, True
    return socket.create_server((address, 0), family=family, backlog=256, dualstack_ipv6=both)


def is_loopback(host: str) -> bool:
    """Whether this is the loopback device by its name, so that no other host is meant."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def addresses(host: str) -> list[str]:
    """Under which this host may be reached by those that reach `host`, best first."""
    if is_loopback(host):
        return [host]
    found = []
    for target in (host, "192.0.2.1"):  # the way to the leader; else the way to anywhere: no packet is sent
        try:
            family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue
    return list(dict.fromkeys(found))


class Meeting:
    """One attempt of a node to meet the others. `doing` says what it waits for, for whoever gives it up."""

    def __init__(self, shard: Shard, epoch: int, host: str, port: int, timeout: float) -> None:
        self.shard = shard
        self.epoch = epoch
        self.host = host
        self.timeout = timeout
        self.doing = f"the leader's store at {host}:{port} did not answer"
        self._port = port
        self._deadline = time.monotonic() + timeout
        self._ended = threading.Event()
        self._calls: list[Callable[[], None]] = []

    def give_up(self) -> None:
        """Whatever waits here raises GroupBroken soon. From any thread."""
        self._ended.set()
        while self._calls:
            self._calls.pop()()

    def when_given_up(self, call: Callable[[], None]) -> None:
        """Call this then, on whichever thread; now, if it has been. It may be called more than once."""
        self._calls.append(call)
        if self._ended.is_set():
            call()

    @property
    def given_up(self) -> bool:
        return self._ended.is_set()

    @property
    def remaining(self) -> float:
        """Seconds left. Raises GroupBroken if there are none, or if the attempt was given up."""
        remaining = self._deadline - time.monotonic()
        if self._ended.is_set() or remaining <= 0:
            raise GroupBroken(f"epoch {self.epoch} was not formed: {self.doing}")
        return remaining

    def exchange(self, port: int, store_port: int = 0) -> Complete:
        """Tell all nodes that this one listens at `port`; returns what they tell when all have come.

        Raises GroupBroken if they do not come in time, or if the leader closes its store.
        """
        world, rank = self.shard.world, self.shard.rank
        arrival = Arrival(self.epoch, rank, world, addresses(self.host), port, store_port)
        try:
            with socket.create_connection((self.host, self._port), timeout=self.remaining) as connection:
                connection.sendall(_framed(arrival))
                return self._hear(connection)
        except OSError as error:
            raise GroupBroken(f"epoch {self.epoch} was not formed: {self.doing} ({error})") from error

    def _hear(self, connection: socket.socket) -> Complete:
        heard = b""
        while True:
            connection.settimeout(min(_LOOK, self.remaining))
            try:
                received = connection.recv(1 << 16)
            except TimeoutError:
                continue
            if not received:
                raise ConnectionError("the leader closed its store")
            heard += received
            while (frame := _whole(heard)) is not None:
                heard = heard[4 + len(frame) :]
                answer = _decode_answer(frame)
                if isinstance(answer, Complete):
                    self.doing = "the nodes have met but could not connect"
                    return answer
                self.doing = f"{named(answer.ranks)} did not come"


def named(ranks: list[int]) -> str:
    return f"node{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _framed(message: Arrival | Missing | Complete) -> bytes:
    body = msgspec.json.encode(message)
    return len(body).to_bytes(4, "little") + body


def _whole(data: bytes) -> bytes | None:
    """The first frame, if all of it is there."""
    size = int.from_bytes(data[:4], "little")
    if len(data) >= 4 and size > _FRAME_LIMIT:
        raise ConnectionError("that is no node")
    return data[4 : 4 + size] if len(data) >= max(4, 4 + size) else None
