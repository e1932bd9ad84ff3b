from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computron.parameter_service.wire import frames
from computron.parameter_service.wire.frames import HEAD, FrameError, FrameReader, frame
from computron.parameter_service.wire.messages import Flush, Push


class Sink:
    def __init__(self, *, drop: bool = False) -> None:
        self.drop = drop
        self.got: list[tuple[object, bytes]] = []
        self._payload = bytearray()

    def destination(self, message: object, size: int) -> memoryview | None:
        self._payload = bytearray() if self.drop else bytearray(size)
        return None if self.drop else memoryview(self._payload)

    def received(self, message: object, fds: list[int]) -> None:
        self.got.append((message, bytes(self._payload)))
        self._payload = bytearray()


def feed(reader: FrameReader, data: bytes, sizes: list[int]) -> None:
    at = turn = 0
    while at < len(data):
        buffer = reader.buffer()
        assert len(buffer) > 0
        count = min(sizes[turn % len(sizes)], len(buffer), len(data) - at)
        buffer[:count] = data[at : at + count]
        reader.filled(count)
        at, turn = at + count, turn + 1


MESSAGES = st.lists(st.tuples(st.text(max_size=50), st.binary(max_size=300)), max_size=8)


@given(MESSAGES, st.lists(st.integers(1, 400), min_size=1, max_size=6), st.booleans())
def test_messages_come_as_they_were_sent_however_they_were_cut(messages, sizes, drop) -> None:
    sink = Sink(drop=drop)
    data, expected = b"", []
    for step, (text, payload) in enumerate(messages):
        message = Push(text, 1, step, 2) if payload else Flush(text, step)
        data += frame(message, len(payload)) + payload
        expected.append((message, b"" if drop else payload))
    feed(FrameReader(sink), data, sizes)
    assert sink.got == expected


def test_a_body_larger_than_the_buffer_is_read(monkeypatch) -> None:
    monkeypatch.setattr(frames, "READ_AHEAD", 64)
    sink = Sink()
    message = Push("x" * 1000, 1, 2, 3)
    feed(FrameReader(sink), frame(message, 5) + b"12345" + frame(message), [37])
    assert sink.got == [(message, b"12345"), (message, b"")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n", "does not speak"),
        (HEAD.pack(b"PS", 99, 0, 1, 0), "version 99"),
        (HEAD.pack(b"PS", 1, 0, 1 << 31, 0), "a message of 2147483648 bytes"),
        (HEAD.pack(b"PS", 1, 0, 3, 0) + b"abc", "cannot be read"),
        (frame(Flush("job", 1), fds=1), "1 file descriptors were announced and 0 came"),
    ],
)
def test_what_is_no_frame_is_told(data, said) -> None:
    with pytest.raises(FrameError, match=said):
        feed(FrameReader(Sink()), data, [1000])


def test_a_payload_of_another_size_than_its_place_is_an_error() -> None:
    class Narrow(Sink):
        def destination(self, message: object, size: int) -> memoryview:
            return memoryview(bytearray(size - 1))

    with pytest.raises(FrameError, match="10 bytes for 9"):
        feed(FrameReader(Narrow()), frame(Flush("job", 1), 10) + bytes(10), [100])
