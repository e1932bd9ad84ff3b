"""One end of a connection between agents and aggregators: over TCP, or over a Unix socket that carries memory too."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakSet

from computron.parameter_service.wire.frames import BODY_LIMIT, STRANGERS_BODY, FrameError, FrameReader, frame
from computron.parameter_service.wire.messages import Address

Buffer = bytes | bytearray | memoryview

log = logging.getLogger(__name__)

FDS_AT_ONCE = 250  # the kernel takes 253 with one message
INTRODUCED = 10.0  # seconds within which a stranger must say who it is
CONNECTED = 2.0  # seconds that a connection may take to come about
UNANSWERED = 30  # seconds after which the kernel gives up a peer that acknowledges nothing
SILENT, PROBED, PROBES = 10, 5, 4  # seconds of silence before the kernel probes a peer, and between its probes
RETRY = 1.0  # seconds after which connections are taken again where there was no file descriptor for one


class Receiver(Protocol):
    """What comes in is told to it, in the event loop's thread."""

    def destination(self, link: Link, message: Any, size: int) -> memoryview | None:
        """Where the payload that follows this message goes: exactly `size` writable bytes. None: it is dropped."""

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        """The message has come, and its payload is in its place. The file descriptors belong to the callee."""

    def lost(self, link: Link, reason: str) -> None:
        """The connection has ended, and not by `close`. Told once."""


class Link(Protocol):
    """It belongs to the event loop's thread."""

    closed: bool
    shares_memory: bool

    def trust(self) -> None:
        """The other end has shown that it belongs here. Until then who connected here gets little room and time."""

    def send(self, message: Any, *, payload: Buffer | None = None, fds: Sequence[int] = ()) -> None:
        """Behind what was sent before; dropped if the link has ended. The payload must stay as it is until it is sent.
        Only a link that shares memory carries file descriptors, which are duplicated; where they cannot be, it ends.
        """

    def close(self) -> None:
        """End it. What was sent before and is not on its way yet is lost."""


class _Reading:
    """What both kinds of links do with what they read."""

    closed: bool
    shares_memory: bool

    def __init__(self, receiver: Receiver) -> None:
        self.closed = False
        self._receiver = receiver
        self._reader = FrameReader(self)

    def trust(self) -> None:
        self._reader.body_limit = BODY_LIMIT

    def meet_stranger(self) -> None:
        self._reader.body_limit = STRANGERS_BODY
        asyncio.get_running_loop().call_later(INTRODUCED, self._part)

    def _part(self) -> None:
        if not self.closed and self._reader.body_limit == STRANGERS_BODY:
            self._end(f"it has not said who it is within {INTRODUCED:g} s")

    def _filled(self, count: int) -> None:
        try:
            self._reader.filled(count)
            if len(self._reader.fds) > FDS_AT_ONCE:
                raise FrameError(f"{len(self._reader.fds)} file descriptors came, more than one message has")
        except FrameError as error:
            self._end(str(error))

    def _end(self, reason: str) -> None:
        raise NotImplementedError

    def destination(self, message: Any, size: int) -> memoryview | None:
        return self._receiver.destination(self, message, size)  # type: ignore[arg-type]

    def received(self, message: Any, fds: list[int]) -> None:
        if self.closed:
            for fd in fds:
                os.close(fd)
            return
        self._receiver.received(self, message, fds)  # type: ignore[arg-type]

    def _ended(self, reason: str) -> None:
        if not self.closed:
            self.closed = True
            self._receiver.lost(self, reason)  # type: ignore[arg-type]
        while self._reader.fds:
            os.close(self._reader.fds.popleft())


class RemoteLink(_Reading, asyncio.BufferedProtocol):
    """Over TCP: payloads are read by the transport straight to where they belong."""

    shares_memory = False

    def __init__(self, receiver: Receiver) -> None:
        super().__init__(receiver)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        if self.closed:
            transport.abort()  # type: ignore[attr-defined]
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED * 1000)
        if hasattr(socket, "TCP_KEEPIDLE"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBED)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)

    def send(self, message: Any, *, payload: Buffer | None = None, fds: Sequence[int] = ()) -> None:
        if fds:
            raise ValueError("file descriptors do not travel over TCP")
        if self.closed or self._transport is None:
            return
        if payload is None:
            self._transport.write(frame(message))
            return
        view = memoryview(payload).cast("B")
        self._transport.write(frame(message, len(view)))
        self._transport.write(view)

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._filled(nbytes)

    def _end(self, reason: str) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._ended(reason)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended(str(error) if error else "the other end closed the connection")


class LocalLink(_Reading):
    """Over a Unix socket, with file descriptors."""

    shares_memory = True

    def __init__(self, receiver: Receiver, connection: socket.socket) -> None:
        super().__init__(receiver)
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def send(self, message: Any, *, payload: Buffer | None = None, fds: Sequence[int] = ()) -> None:
        if len(fds) > FDS_AT_ONCE:
            raise ValueError(f"{len(fds)} file descriptors at once, more than {FDS_AT_ONCE}")
        if self.closed:
            return
        try:
            copies = _duplicated(fds)
        except OSError as error:
            self._end(f"memory cannot be handed over: {error}")
            return
        waiting = bool(self._unsent)
        view = None if payload is None else memoryview(payload).cast("B")
        head = memoryview(frame(message, 0 if view is None else len(view), len(fds)))
        self._unsent.append((head, copies))
        if view is not None:
            self._unsent.append((view, ()))
        if not waiting:
            self._write()

    def close(self) -> None:
        self.closed = True
        self._end("closed here")

    def _read(self) -> None:
        try:
            size, control, flags, _ = self._socket.recvmsg_into(
                [self._reader.buffer()], socket.CMSG_SPACE(FDS_AT_ONCE * 4), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(str(error))
            return
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._reader.fds.extend(memoryview(data[: len(data) - len(data) % 4]).cast("i"))
        if not size or flags & socket.MSG_CTRUNC:
            self._end("this process has no file descriptors left" if size else "the other end closed the connection")
            return
        self._filled(size)

    def _write(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._socket, self._write)
                return
            except OSError as error:
                self._end(str(error))
                return
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._unsent[0] = (data[sent:], ())
            else:
                self._unsent.popleft()
        self._loop.remove_writer(self._socket)

    def _end(self, reason: str) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        self._ended(reason)


def _duplicated(fds: Sequence[int]) -> list[int]:
    """Of all or of none. Raises OSError."""
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for fd in fds)
    except OSError:
        for fd in copies:
            os.close(fd)
        raise
    return copies


async def connect(address: Address, receiver: Receiver, *, machine: str) -> Link:
    """Through memory that is shared if the aggregator is on this machine, else over TCP. Raises OSError."""
    try:
        async with asyncio.timeout(CONNECTED):
            return await _connect(address, receiver, machine)
    except TimeoutError as error:
        raise OSError(f"{address.aggregator} does not answer within {CONNECTED:g} s") from error


async def _connect(address: Address, receiver: Receiver, machine: str) -> Link:
    loop = asyncio.get_running_loop()
    if address.machine == machine:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, address.path)
        except BaseException:
            connection.close()
            raise
        return LocalLink(receiver, connection)
    _, link = await loop.create_connection(lambda: RemoteLink(receiver), address.host, address.port)
    return link


class Listener:
    """Takes connections on a TCP port and on a Unix socket; what comes in is told to one receiver."""

    def __init__(self, unix: socket.socket, receiver: Receiver) -> None:
        self._server: asyncio.Server
        self._unix = unix
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._links: WeakSet[RemoteLink | LocalLink] = WeakSet()
        self._listen()

    async def start(self, host: str, port: int) -> None:
        """Raises OSError."""
        self._server = await self._loop.create_server(self._remote, host, port)

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """With all connections."""
        if self._unix.fileno() < 0:
            return
        self._loop.remove_reader(self._unix)
        self._unix.close()
        self._server.close()
        for link in list(self._links):
            link.close()

    def _listen(self) -> None:
        if self._unix.fileno() >= 0:
            self._loop.add_reader(self._unix, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._unix.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("a worker of this machine cannot connect: %s", error)
            self._loop.remove_reader(self._unix)
            self._loop.call_later(RETRY, self._listen)
            return
        self._met(LocalLink(self._receiver, connection))

    def _remote(self) -> RemoteLink:
        link = RemoteLink(self._receiver)
        self._met(link)
        return link

    def _met(self, link: RemoteLink | LocalLink) -> None:
        link.meet_stranger()
        self._links.add(link)


async def listen(host: str, port: int, path: str, receiver: Receiver) -> Listener:
    """port: 0 for any. path: of the Unix socket; an abstract one begins with a zero byte. Raises OSError."""
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        unix.setblocking(False)
        unix.bind(path)
        unix.listen(socket.SOMAXCONN)
        listener = Listener(unix, receiver)
        await listener.start(host, port)
    except BaseException:
        asyncio.get_running_loop().remove_reader(unix)
        unix.close()
        raise
    return listener
