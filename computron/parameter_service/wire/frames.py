"""A frame: a fixed head, a msgpack body, and a payload of raw bytes, which goes straight to where it belongs."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, Protocol

import msgspec

from computron.parameter_service.wire.messages import VERSION, Data, decoder, encoder

HEAD = struct.Struct("<2sBBIQ")  # magic, version, file descriptors, bytes of the body, bytes of the payload
MAGIC = b"PS"
BODY_LIMIT = 64 << 20
STRANGERS_BODY = 8 << 20  # a job of 100,000 tensors, as another aggregator describes it
READ_AHEAD = 64 << 10

_encode = encoder().encode
_decoder = decoder(Data)


class FrameError(ConnectionError):
    """What came is not a frame of this protocol's version."""


class Sink(Protocol):
    """Who gets what a reader reads."""

    def destination(self, message: Any, size: int) -> memoryview | None:
        """Where the payload that follows this message goes: exactly `size` writable bytes. None: it is dropped."""

    def received(self, message: Any, fds: list[int]) -> None:
        """The message has come, and its payload is in its place. The file descriptors belong to the callee."""


def frame(message: Any, payload: int = 0, fds: int = 0) -> bytes:
    """The head and the body. payload: bytes that follow."""
    body = _encode(message)
    return HEAD.pack(MAGIC, VERSION, fds, len(body), payload) + body


class FrameReader:
    """Turns bytes into messages: whoever reads puts them where `buffer` says and tells how many by `filled`.

    Heads and bodies go through a small buffer; what is missing of a payload is read to its destination directly.
    """

    def __init__(self, sink: Sink, body_limit: int = BODY_LIMIT) -> None:
        self.body_limit = body_limit  # bytes
        self.fds: deque[int] = deque()  # that have come and belong to frames still to come
        self._sink = sink
        self._small = bytearray(READ_AHEAD)
        self._start = self._end = 0  # of what has been read there and not been used
        self._message: Any = None  # whose payload is being read
        self._fds: list[int] = []
        self._missing = 0
        self._target: memoryview | None = None

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._missing:
            if self._target is not None:
                return self._target[len(self._target) - self._missing :]
            return memoryview(self._small)[: min(self._missing, len(self._small))]
        if self._start:
            self._small[: self._end - self._start] = self._small[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        return memoryview(self._small)[self._end :]

    def filled(self, count: int) -> None:
        """Raises FrameError if these bytes cannot be understood; the connection is of no use then."""
        if self._missing:
            self._missing -= count
            if not self._missing:
                self._payload_came()
            return
        self._end += count
        while self._next():
            pass

    def _next(self) -> bool:
        """Take one frame's head, body and what is here of its payload; False if more must be read before."""
        have = self._end - self._start
        if have < HEAD.size:
            return False
        magic, version, fds, body, payload = HEAD.unpack_from(self._small, self._start)
        if magic != MAGIC:
            raise FrameError("the other end does not speak the Parameter Service's protocol")
        if version != VERSION:
            raise FrameError(f"the other end speaks version {version} of the protocol, this one {VERSION}")
        if body > self.body_limit:
            raise FrameError(f"a message of {body} bytes, more than {self.body_limit}")
        if have < HEAD.size + body:
            if HEAD.size + body > len(self._small):
                small, self._small = self._small, bytearray(HEAD.size + body)  # whoever reads may have the old one
                self._small[: len(small)] = small
            return False
        start = self._start + HEAD.size
        with memoryview(self._small) as view:
            try:
                message = _decoder.decode(view[start : start + body])
            except msgspec.MsgspecError as error:
                raise FrameError(f"a message that cannot be read: {error}") from error
        self._start = start + body
        if fds > len(self.fds):
            raise FrameError(f"{fds} file descriptors were announced and {len(self.fds)} came")
        self._fds = [self.fds.popleft() for _ in range(fds)]
        self._message = message
        if not payload:
            self._payload_came()
            return True
        self._target = self._sink.destination(message, payload)
        if self._target is not None and len(self._target) != payload:
            raise FrameError(f"{payload} bytes for {len(self._target)}: {message!r:.200}")
        here = min(payload, self._end - self._start)
        if self._target is not None:
            self._target[:here] = self._small[self._start : self._start + here]
        self._start += here
        self._missing = payload - here
        if self._missing:
            self._start = self._end = 0
            return False
        self._payload_came()
        return True

    def _payload_came(self) -> None:
        message, fds = self._message, self._fds
        self._message, self._fds, self._target = None, [], None
        self._sink.received(message, fds)
