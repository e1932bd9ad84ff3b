"""Messages between two nodes over one TCP connection: u32 length, little-endian, then so many bytes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

Buffer = bytes | bytearray | memoryview
Body = Buffer | Sequence[Buffer]

SIZE_LIMIT = 1 << 30  # of one message
UNSENT_LIMIT = 512 << 20  # that may wait for a peer which does not read
UNREAD_LIMIT = 64 << 20  # that may wait for `receive` before the peer has to
JOINED = 64 << 10  # buffers below this size are copied together
UNANSWERED = 60  # seconds after which the kernel gives up a peer that acknowledges nothing


class Channel(asyncio.Protocol):
    """One end of a connection. It belongs to the event loop's thread, and one task at a time receives.

    `last_heard`: when anything came in, by time.monotonic(). A channel that has ended sends nothing, silently:
    `receive` tells of its end, and `closed` does. `size_limit`: of a message that comes in.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        unsent_limit: int = UNSENT_LIMIT,
        size_limit: int = SIZE_LIMIT,
    ) -> None:
        """Takes the connection over from these two, with what they have read."""
        self.size_limit = size_limit
        self.last_heard = time.monotonic()
        self._writer = writer
        self._transport: asyncio.Transport = writer.transport  # type: ignore[assignment]
        self._unsent_limit = unsent_limit
        self._bodies: deque[bytes] = deque()
        self._unread = 0  # bytes in `_bodies`
        self._paused = False
        self._waiting: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []  # of a message's length or body, of which `_missing` bytes have not come
        self._missing = 4
        self._in_body = False
        self._reason: str | None = None  # why it has ended
        self._lost = asyncio.Event()
        _tune(self._transport)
        self._take_over(reader)

    @property
    def closed(self) -> bool:
        return self._reason is not None

    def send(self, body: Body) -> None:
        """Behind what was sent before. Buffers must stay as they are until they are sent; large ones are not copied.

        A peer that has left more than `unsent_limit` bytes unread is given up: the channel ends. Raises ValueError if
        the message is too large to be sent at all.
        """
        parts = [body] if isinstance(body, Buffer) else body
        parts = [memoryview(part).cast("B") if isinstance(part, memoryview) else part for part in parts]
        size = sum(map(len, parts))
        if size > SIZE_LIMIT:
            raise ValueError(f"a message of {size} bytes exceeds the limit of {SIZE_LIMIT} bytes")
        if self._reason is not None:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._unsent_limit:
            self._end(f"the other node does not read: {unsent} bytes wait to be sent to it")
            return
        small: list[Buffer] = [size.to_bytes(4, "little")]
        for part in parts:
            if len(part) < JOINED:
                small.append(part)
                continue
            self._transport.write(b"".join(small))
            self._transport.write(part)
            small = []
        if small:
            self._transport.write(b"".join(small))

    async def receive(self) -> bytes:
        """The next message. Raises ConnectionError, saying why, when there will be none."""
        while not self._bodies:
            if self._reason is not None:
                raise ConnectionError(self._reason)
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        body = self._bodies.popleft()
        self._unread -= len(body)
        if self._paused and self._unread <= UNREAD_LIMIT // 2:
            self._resume()
        return body

    def close(self) -> None:
        """End at once; what has not been sent or received is lost."""
        self._bodies.clear()
        self._end("the channel was closed here")

    async def drain_and_close(self, timeout: float) -> None:
        """End when the peer has read all that was sent and has closed its end too, or after so many seconds."""
        self._bodies.clear()
        if self._reason is None:
            self._reason = "the channel was closed here"  # nothing is sent or received from now on
            self._wake()
            self._resume()
            self._transport.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._lost.wait()
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_heard = time.monotonic()
        if self._reason is not None:
            return
        at, end = 0, len(data)
        while end - at >= self._missing:
            piece = data[at : at + self._missing]
            at += self._missing
            if self._pieces:
                piece = b"".join([*self._pieces, piece])
                self._pieces.clear()
            if self._in_body:
                self._bodies.append(piece)
                self._unread += len(piece)
                self._in_body, self._missing = False, 4
                continue
            size = int.from_bytes(piece, "little")
            if size > self.size_limit:
                limit = self.size_limit
                self._end(f"a message of {size} bytes was announced, more than {limit}: is that a Computron node?")
                return
            self._in_body, self._missing = True, size
        if at < end:
            self._pieces.append(data[at:] if at else data)
            self._missing -= end - at
        if self._bodies:
            self._wake()
        if self._unread > UNREAD_LIMIT and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """The peer has closed its end: what is still to be sent is sent, then this end is closed."""
        if self._reason is None:
            self._reason = "the other node ended the connection"
            if self._in_body or self._missing < 4:
                self._reason += " within a message"
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._reason is None:
            self._reason = f"the connection broke: {error or 'it ended'}"
        self._lost.set()
        self._wake()

    def _take_over(self, reader: asyncio.StreamReader) -> None:
        """Be the transport's protocol from now on, in place of the one that fed `reader`."""
        self._transport.set_protocol(self)
        while True:
            reading = reader.read(1 << 20)
            try:
                reading.send(None)
            except StopIteration as read:
                if not read.value:
                    self.eof_received()
                    self._transport.close()
                    return
                self.data_received(read.value)
            except OSError as error:
                self.connection_lost(error)
                return
            else:
                reading.close()  # it would wait: all that was read has been taken
                break
        if self._transport.is_closing():
            self.connection_lost(None)

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._wake()
        self._transport.abort()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _tune(transport: asyncio.Transport) -> None:
    """Small messages leave at once, and a peer whose host is gone is noticed."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED * 1000)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, UNANSWERED // 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, UNANSWERED // 4)
