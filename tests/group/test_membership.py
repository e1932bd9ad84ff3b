"""Nodes find their leader, stay with it, and are taken for lost when they go or fall silent."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace

import pytest

from computron.errors import ConfigError
from computron.group.environment import Place
from computron.group.hub import HELLO_LIMIT, Hub
from computron.group.link import Link
from tests.ports import ports_in_a_row

SETTINGS = {"models": "a, b"}


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, int, object]] = asyncio.Queue()

    def joined(self, hello) -> None:
        self.events.put_nowait(("joined", hello.rank, hello.host))

    def received(self, rank, body) -> None:
        self.events.put_nowait(("received", rank, body))

    def left(self, rank, reason) -> None:
        self.events.put_nowait(("left", rank, reason))

    async def next(self):
        async with asyncio.timeout(20):
            return await self.events.get()


@pytest.fixture
def place() -> Place:
    return Place(0, 3, 0, 3, "127.0.0.1", ports_in_a_row(1))


@pytest.fixture
async def hub(place):
    heard = Heard()
    hub = Hub(place, SETTINGS, 10.0, heard)
    await hub.open()
    yield hub, heard
    await hub.close()


@pytest.fixture
async def link(place):
    """Links of nodes of the group, by rank."""
    links = []

    def make(rank, settings=SETTINGS, world_size=3):
        links.append(Link(replace(place, rank=rank, world_size=world_size), settings))
        return links[-1]

    yield make
    for each in links:
        each.close()


async def test_messages_pass_in_order_in_both_directions(hub, link):
    hub, heard = hub
    node = link(2)
    await node.connect()
    assert await heard.next() == ("joined", 2, socket.gethostname())
    for number in range(100):
        node.send(b"%d" % number)
        hub.send(2, b"%d" % number)
    messages = node.messages()
    for number in range(100):
        assert await heard.next() == ("received", 2, b"%d" % number)
        assert await anext(messages) == b"%d" % number


async def test_a_node_that_closes_its_connection_has_left(hub, link):
    hub, heard = hub
    node = link(1)
    await node.connect()
    await heard.next()
    node.close()
    assert (await heard.next())[:2] == ("left", 1)
    hub.send(1, b"nobody hears this")


async def test_a_node_that_connects_anew_replaces_its_old_connection(hub, link):
    _, heard = hub
    node = link(1)
    await node.connect()
    await heard.next()
    lost, node._channel = node._channel, None  # as if it had broken here and not there
    await node.connect()
    assert await heard.next() == ("left", 1, "it was started anew")
    assert (await heard.next())[0] == "joined"
    node.send(b"here")
    assert await heard.next() == ("received", 1, b"here")
    lost.close()


async def test_a_second_process_with_the_rank_of_a_living_one_is_told_so(hub, link):
    hub, heard = hub
    first, second = link(1), link(1)
    await first.connect()
    await heard.next()
    obeying = asyncio.ensure_future(anext(first.messages()))
    for _ in range(3):
        with pytest.raises(ConfigError, match=rf"rank 1 is already served by process {os.getpid()} on .*--host-rank"):
            await second.connect()
    hub.send(1, b"go on")
    assert await obeying == b"go on"
    first.send(b"here")
    assert await heard.next() == ("received", 1, b"here")


async def test_a_restarted_node_takes_the_place_of_one_that_does_not_answer(hub, link, monkeypatch):
    monkeypatch.setattr("computron.group.hub.ANSWER", 0.05)
    hub, heard = hub
    first, second = link(1), link(1)
    await first.connect()
    await heard.next()
    await second.connect()
    assert await heard.next() == ("left", 1, "it was started anew")
    assert (await heard.next())[0] == "joined"
    assert [body async for body in first.messages()] == []
    second.send(b"here")
    assert await heard.next() == ("received", 1, b"here")


async def test_a_leader_that_ends_lets_its_nodes_know_and_they_find_the_next_one(place, link):
    heard = Heard()
    hub = Hub(place, SETTINGS, 10.0, heard)
    await hub.open()
    node = link(1)
    await node.connect()
    await heard.next()
    hub.broadcast(b"the last words")
    await hub.close()
    assert [body async for body in node.messages()] == [b"the last words"]
    assert node.why_lost
    searching = asyncio.ensure_future(node.connect())
    await asyncio.sleep(0.2)
    assert not searching.done()
    other = Hub(place, SETTINGS, 10.0, heard)
    await other.open()
    await searching
    assert (await heard.next())[0] == "joined"
    await other.close()


async def test_a_silent_node_is_taken_for_lost_and_a_silent_leader_too(place, link, monkeypatch):
    monkeypatch.setattr("computron.group.hub.PING", b"")
    heard = Heard()
    hub = Hub(place, SETTINGS, 0.5, heard)
    await hub.open()
    silent = link(1)
    await silent.connect()
    silent._watch.cancel()  # it beats no more
    await heard.next()
    event = await heard.next()
    assert event[:2] == ("left", 1)
    assert "nothing was heard of it" in event[2]
    node = link(2)
    await node.connect()
    for task in list(hub._tasks):
        if "_watch" in repr(task):
            task.cancel()  # the leader beats no more
    assert [body async for body in node.messages()] == []
    assert "nothing was heard of the leader" in node.why_lost
    await hub.close()


@pytest.mark.parametrize(
    ("rank", "settings", "world_size", "expected"),
    [
        (1, {"models": "a"}, 3, "models is a there and a, b here"),
        (1, {**SETTINGS, "b: dtype": "'float32'"}, 3, "b: dtype is 'float32' there and not set here"),
        (3, SETTINGS, 4, "rank 3 of 4; this group has the ranks 1 to 2"),
        (0, SETTINGS, 3, "rank 0 of 3"),
    ],
)
async def test_who_does_not_belong_here_is_told_why(hub, link, rank, settings, world_size, expected):
    with pytest.raises(ConfigError, match=expected):
        await link(rank, settings, world_size).connect()


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"\x03\x00\x00\x00abc", b"\x01\x00\x00\x00\x90", b"\0\0\0\x20"]
)
async def test_strangers_are_sent_away(hub, place, words):
    _, heard = hub
    reader, writer = await asyncio.open_connection(place.master_host, place.control_port)
    writer.write(words)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    assert heard.events.empty()


async def test_a_message_that_the_leader_fails_at_ends_the_connection_with_its_words(hub, link, caplog):
    hub, heard = hub
    node = link(1)
    await node.connect()
    await heard.next()

    def fail(rank, body) -> None:
        raise ZeroDivisionError("no such number")

    heard.received = fail
    node.send(b"divide")
    event = await heard.next()
    assert event == ("left", 1, "the leader failed at what it said (ZeroDivisionError: no such number)")
    assert "Traceback" in caplog.text


async def test_after_its_hello_a_node_may_say_more_at_once(hub, link):
    hub, heard = hub
    node = link(1)
    await node.connect()
    await heard.next()
    long = bytes(HELLO_LIMIT + 1)
    node.send(long)
    assert await heard.next() == ("received", 1, long)
