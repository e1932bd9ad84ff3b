"""Both kinds of links carry messages and payloads; those of one machine carry memory too."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from computron.parameter_service.wire import frames
from computron.parameter_service.wire import link as wire
from computron.parameter_service.wire.link import Link, Listener, connect, listen
from computron.parameter_service.wire.machine import machine_id
from computron.parameter_service.wire.messages import Address, Flush, Push, Pushed
from computron.parameter_service.wire.segments import Segment

MIB = 1 << 20


class End:
    """One end of links: keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, bytes, list[int]]] = []
        self.lost_reasons: list[str] = []
        self.links: list[Link] = []
        self._payload = bytearray()
        self._changed = asyncio.Event()

    def destination(self, link: Link, message: Any, size: int) -> memoryview:
        self._payload = bytearray(size)
        return memoryview(self._payload)

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        if link not in self.links:
            self.links.append(link)
        self.got.append((message, bytes(self._payload), fds))
        self._payload = bytearray()
        self._changed.set()

    def lost(self, link: Link, reason: str) -> None:
        self.lost_reasons.append(reason)
        self._changed.set()

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not what():
                self._changed.clear()
                await self._changed.wait()


class Pair:
    def __init__(self, listener: Listener, there: End, address: Address) -> None:
        self.listener, self.there, self.address = listener, there, address
        self.here = End()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    there, path = End(), f"\0computron-test-{uuid.uuid4().hex}"
    listener = await listen("127.0.0.1", 0, path, there)
    yield Pair(listener, there, Address("a", "127.0.0.1", listener.port, machine_id(), path))
    listener.close()
    await asyncio.sleep(0)


KINDS = pytest.mark.parametrize("shared", [True, False], ids=["local", "remote"])


async def connected(pair: Pair, shared: bool) -> Link:
    link = await connect(pair.address, pair.here, machine=machine_id() if shared else "elsewhere")
    assert link.shares_memory is shared
    return link


@KINDS
async def test_messages_and_payloads_of_any_size_come_in_order(pair: Pair, shared: bool) -> None:
    link = await connected(pair, shared)
    payloads = [os.urandom(size) for size in (1, 100, 70_000, 9 * MIB, 3)]
    for step, payload in enumerate(payloads):
        link.send(Push("job", 1, step, 0), payload=payload)
        link.send(Flush("job", step))
    await pair.there.until(lambda: len(pair.there.got) == 10)
    expected = [
        entry
        for step, payload in enumerate(payloads)
        for entry in ((Push("job", 1, step, 0), payload, []), (Flush("job", step), b"", []))
    ]
    assert pair.there.got == expected
    pair.there.links[0].send(Pushed("job", 4), payload=payloads[3])
    await pair.here.until(lambda: bool(pair.here.got))
    assert pair.here.got == [(Pushed("job", 4), payloads[3], [])]
    link.close()


@KINDS
async def test_the_other_end_hears_when_one_ends(pair: Pair, shared: bool) -> None:
    link = await connected(pair, shared)
    link.send(Flush("job", 1))
    await pair.there.until(lambda: bool(pair.there.got))
    link.close()
    await pair.there.until(lambda: bool(pair.there.lost_reasons))
    assert pair.here.lost_reasons == []  # it was closed here
    link.send(Flush("job", 2))
    assert len(pair.there.got) == 1


@KINDS
async def test_an_end_that_speaks_something_else_is_cut_off(pair: Pair, shared: bool) -> None:
    family, where = (
        (socket.AF_UNIX, pair.address.path) if shared else (socket.AF_INET, (pair.address.host, pair.address.port))
    )
    with socket.socket(family) as stranger:
        stranger.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stranger, where)
        stranger.send(b"GET / HTTP/1.1\r\n\r\n")
        await pair.there.until(lambda: bool(pair.there.lost_reasons))
    assert "does not speak the Parameter Service's protocol" in pair.there.lost_reasons[0]


async def test_memory_travels_between_processes_of_one_machine(pair: Pair) -> None:
    link = await connected(pair, True)
    segments = [Segment.create("segment", 4096) for _ in range(3)]
    for number, segment in enumerate(segments):
        segment.view()[0] = number + 1
    link.send(Flush("job", 1), fds=[segment.fd for segment in segments])
    link.send(Flush("job", 2))
    await pair.there.until(lambda: len(pair.there.got) == 2)
    assert pair.there.got[1][2] == []
    for number, fd in enumerate(pair.there.got[0][2]):
        same = Segment(fd, 4096)
        assert same.view()[0] == number + 1
        segments[number].view()[1] = 9
        assert same.view()[1] == 9
        same.close()
    for segment in segments:
        segment.close()
    link.close()


async def test_memory_does_not_travel_between_machines(pair: Pair) -> None:
    link = await connected(pair, False)
    with pytest.raises(ValueError, match="do not travel"):
        link.send(Flush("job", 1), fds=[0])
    link.close()


async def test_nobody_there_is_an_error(pair: Pair) -> None:
    pair.listener.close()
    for machine in (machine_id(), "elsewhere"):
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await connect(pair.address, pair.here, machine=machine)


@KINDS
async def test_a_stranger_gets_little_room(pair: Pair, shared: bool) -> None:
    long = Push("x" * frames.STRANGERS_BODY, 1, 1, 1)
    link = await connected(pair, shared)
    link.send(Flush("job", 1))
    await pair.there.until(lambda: bool(pair.there.links))
    pair.there.links[0].trust()
    link.send(long)
    await pair.there.until(lambda: len(pair.there.got) == 2)
    stranger = await connected(pair, shared)
    stranger.send(long)
    await pair.there.until(lambda: bool(pair.there.lost_reasons))
    assert "a message of" in pair.there.lost_reasons[0]
    link.close()
    stranger.close()


@KINDS
async def test_a_stranger_gets_little_time(pair: Pair, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "INTRODUCED", 0.3)
    link, stranger = await connected(pair, shared), await connected(pair, shared)
    link.send(Flush("job", 1))
    await pair.there.until(lambda: bool(pair.there.links))
    pair.there.links[0].trust()
    await pair.there.until(lambda: bool(pair.there.lost_reasons))
    await pair.here.until(lambda: bool(pair.here.lost_reasons))
    assert pair.there.lost_reasons == ["it has not said who it is within 0.3 s"]
    assert (link.closed, stranger.closed) == (False, True)
    link.close()


async def test_file_descriptors_that_no_message_has_end_the_link(pair: Pair) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hostile, open(os.devnull) as null:
        hostile.connect(pair.address.path)
        for byte in frames.MAGIC:
            socket.send_fds(hostile, [bytes([byte])], [null.fileno()] * 200)
        await pair.there.until(lambda: bool(pair.there.lost_reasons))
    assert "400 file descriptors came" in pair.there.lost_reasons[0]


async def test_a_link_that_has_no_descriptor_left_to_send_ends_and_keeps_none(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = await connected(pair, True)
    segments = [Segment.create("segment", 4096) for _ in range(3)]
    copied: list[int] = []
    duplicate = os.dup

    def scarce(fd: int) -> int:
        if len(copied) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        copied.append(duplicate(fd))
        return copied[-1]

    with monkeypatch.context() as scarcity:
        scarcity.setattr(os, "dup", scarce)
        link.send(Flush("job", 1), fds=[segment.fd for segment in segments])
    assert link.closed
    assert "Too many open files" in pair.here.lost_reasons[0]
    for fd in copied:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for segment in segments:
        segment.close()


async def test_the_kernel_looks_whether_a_silent_machine_is_there(pair: Pair) -> None:
    link = await connected(pair, False)
    assert isinstance(link, wire.RemoteLink)
    assert link._transport is not None
    connection = link._transport.get_extra_info("socket")
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    silent, probed, probes = (connection.getsockopt(socket.IPPROTO_TCP, name) for name in names)
    assert silent + probed * probes <= wire.UNANSWERED
    link.close()


async def test_a_peer_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(wire, "CONNECTED", 0.01)
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", silent, raising=False)
    with pytest.raises(OSError, match="aggregator does not answer within"):
        async with asyncio.timeout(5):
            await connect(Address("aggregator", "host", 1, "elsewhere", ""), End(), machine="here")
