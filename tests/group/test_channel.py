from __future__ import annotations

import asyncio
import inspect
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from computron.group import channel as module
from computron.group.channel import Channel


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test on asyncio's own event loop and on uvloop's."""

    @pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def run(loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [monkeypatch] if inspect.signature(test).parameters else []
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(asyncio.wait_for(test(*wanted), 60))

    return run


@asynccontextmanager
async def connected(unsent_limit: int = module.UNSENT_LIMIT) -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a connection."""
    accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result(Channel(r, w)), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    ends = Channel(reader, writer, unsent_limit=unsent_limit), await accepted
    try:
        yield ends
    finally:
        for end in ends:
            end.close()
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def peer_socket(unsent_limit: int = module.UNSENT_LIMIT) -> AsyncIterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare socket at the other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader, writer = await asyncio.open_connection(*server.getsockname())
        peer, _ = server.accept()
    peer.setblocking(False)
    channel = Channel(reader, writer, unsent_limit=unsent_limit)
    with peer:
        try:
            yield channel, peer
        finally:
            channel.close()
            await asyncio.sleep(0)


@on_both_loops
async def test_messages_arrive_whole_and_in_order() -> None:
    async with connected() as (here, there):
        for size in (0, 1, 3, 100, 70_000, 0, 5):
            here.send(bytes([size % 251]) * size)
        here.send([b"several ", bytearray(b"buffers "), memoryview(b"as one")])
        assert [len(await there.receive()) for _ in range(7)] == [0, 1, 3, 100, 70_000, 0, 5]
        assert await there.receive() == b"several buffers as one"


@on_both_loops
async def test_both_ends_may_send_at_once() -> None:
    async with connected() as (here, there):
        for number in range(100):
            here.send(b"%d" % number)
            there.send(b"%d" % -number)
        assert [int(await there.receive()) for _ in range(100)] == list(range(100))
        assert [int(await here.receive()) for _ in range(100)] == [-n for n in range(100)]


@on_both_loops
async def test_large_buffers_arrive_between_small_ones() -> None:
    large = os.urandom(3 << 20)
    async with connected() as (here, there):
        here.send([b"head", memoryview(large), b"tail"])
        here.send(b"next")
        assert await there.receive() == b"head" + large + b"tail"
        assert await there.receive() == b"next"


@on_both_loops
async def test_a_message_may_come_in_any_pieces() -> None:
    sent = b"".join(len(body).to_bytes(4, "little") + body for body in (b"first", b"", b"second" * 9))
    async with peer_socket() as (channel, peer):
        for cut in range(len(sent)):
            peer.send(sent[cut : cut + 1])
            await asyncio.sleep(0)
        assert [await channel.receive() for _ in range(3)] == [b"first", b"", b"second" * 9]


@on_both_loops
async def test_what_the_reader_had_already_read_is_not_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader, writer = await asyncio.open_connection(*server.getsockname())
        peer, _ = server.accept()
    with peer:
        peer.sendall(b"\5\0\0\0early\4\0\0\0la")
        assert await reader.readexactly(0) == b""
        while not reader._buffer:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
        channel = Channel(reader, writer)
        peer.sendall(b"te")
        assert [await channel.receive(), await channel.receive()] == [b"early", b"late"]
        channel.close()


@on_both_loops
async def test_a_connection_that_ended_before_it_was_taken_over_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader, writer = await asyncio.open_connection(*server.getsockname())
        peer, _ = server.accept()
    peer.sendall(b"\4\0\0\0last")
    peer.close()
    while not reader._eof:  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)
    channel = Channel(reader, writer)
    assert await channel.receive() == b"last"
    with pytest.raises(ConnectionError, match="the other node ended the connection"):
        await channel.receive()


@on_both_loops
async def test_the_peers_end_is_told_after_its_last_message() -> None:
    async with connected() as (here, there):
        here.send(b"last words")
        assert await there.receive() == b"last words"
        here.close()
        with pytest.raises(ConnectionError):
            await there.receive()
        assert there.closed
        there.send(b"to nobody")


@on_both_loops
async def test_closing_wakes_whoever_receives() -> None:
    async with connected() as (here, _):
        receiving = asyncio.create_task(here.receive())
        await asyncio.sleep(0)
        here.close()
        with pytest.raises(ConnectionError, match="closed here"):
            await receiving


@on_both_loops
async def test_a_receive_may_be_cancelled_without_loss() -> None:
    async with connected() as (here, there):
        receiving = asyncio.create_task(there.receive())
        await asyncio.sleep(0)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        here.send(b"still there")
        assert await there.receive() == b"still there"


@on_both_loops
async def test_draining_hands_over_all_that_was_sent() -> None:
    body = bytes(8 << 20)
    async with connected() as (here, there):
        there.send(b"never read")
        for _ in range(4):
            here.send(body)
        draining = asyncio.create_task(here.drain_and_close(30.0))
        assert [len(await there.receive()) for _ in range(4)] == [len(body)] * 4
        with pytest.raises(ConnectionError, match="the other node ended the connection"):
            await there.receive()
        await draining
        assert here.closed


@on_both_loops
async def test_both_ends_may_drain_at_once() -> None:
    async with connected() as (here, there):
        await asyncio.gather(here.drain_and_close(30.0), there.drain_and_close(30.0))
        assert here.closed
        assert there.closed


@on_both_loops
async def test_draining_into_a_peer_that_does_not_read_ends_in_time() -> None:
    async with peer_socket() as (channel, _):
        channel.send(bytes(64 << 20))
        await channel.drain_and_close(0.05)
        with pytest.raises(ConnectionError):
            await channel.receive()


@on_both_loops
async def test_a_peer_that_does_not_read_is_given_up_at_the_limit() -> None:
    limit, size = 8 << 20, 1 << 20
    async with peer_socket(unsent_limit=limit) as (channel, _):
        sent = 0
        while not channel.closed:
            channel.send(bytes(size))
            sent += size
            await asyncio.sleep(0)
            assert sent < limit + (64 << 20), "more than the limit and the kernel's buffers"
        assert sent > limit
        with pytest.raises(ConnectionError, match="does not read"):
            await channel.receive()


@on_both_loops
async def test_one_message_may_exceed_the_unsent_limit() -> None:
    async with connected(unsent_limit=1 << 20) as (here, there):
        here.send(bytes(32 << 20))
        assert len(await there.receive()) == 32 << 20


@on_both_loops
async def test_unread_messages_hold_the_peer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNREAD_LIMIT", 1 << 20)
    async with connected(unsent_limit=16 << 20) as (here, there):
        for _ in range(200):
            here.send(bytes(256 << 10))
            await asyncio.sleep(0)
            if here.closed:
                break
        assert here.closed, "the receiver took in more than it may"
        while True:
            try:
                assert len(await there.receive()) == 256 << 10
            except ConnectionError:
                break


@on_both_loops
async def test_unread_messages_are_read_on_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNREAD_LIMIT", 1 << 20)
    async with connected() as (here, there):
        for _ in range(100):
            here.send(bytes(256 << 10))
        assert [len(await there.receive()) for _ in range(100)] == [256 << 10] * 100


@on_both_loops
async def test_a_length_beyond_the_limit_ends_the_channel() -> None:
    async with peer_socket() as (channel, peer):
        peer.send((module.SIZE_LIMIT + 1).to_bytes(4, "little"))
        with pytest.raises(ConnectionError, match="is that a Computron node"):
            await channel.receive()


@on_both_loops
async def test_a_message_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE_LIMIT", 10)
    async with connected() as (here, there):
        with pytest.raises(ValueError, match="a message of 11 bytes exceeds the limit"):
            here.send(bytes(11))
        here.send(bytes(10))
        assert await there.receive() == bytes(10)


@on_both_loops
async def test_a_connection_that_ends_within_a_message_says_so() -> None:
    async with peer_socket() as (channel, peer):
        peer.send(b"\5\0\0\0cut")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="within a message"):
            await channel.receive()


@on_both_loops
async def test_a_killed_peer_is_noticed() -> None:
    accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result(Channel(r, w)), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    script = (
        f"import socket; s = socket.create_connection(('127.0.0.1', {port})); s.sendall(b'\\2\\0\\0\\0hi'); s.recv(1)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        channel = await accepted
        assert await channel.receive() == b"hi"
        child.kill()
        with pytest.raises(ConnectionError):
            await channel.receive()
    server.close()
    await server.wait_closed()


@on_both_loops
async def test_last_heard_moves_with_every_byte() -> None:
    async with peer_socket() as (channel, peer):
        before = channel.last_heard
        peer.send(b"\5\0")
        while channel.last_heard == before:
            await asyncio.sleep(0.001)
        assert before < channel.last_heard <= time.monotonic()
