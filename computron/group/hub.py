"""The leader's end of the control connections: who is there, who has gone, and what is said to whom."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Protocol

import msgspec

from computron.errors import ConfigError
from computron.group.channel import SIZE_LIMIT, Body, Channel
from computron.group.environment import Place
from computron.group.hello import PING, Hello, Refusal, Welcome, decode_hello, encode, why_refused
from computron.group.rendezvous import is_loopback

log = logging.getLogger(__name__)

LAST_WORDS = 1.0  # seconds that nodes have to hear what was said last
HELLO_TIMEOUT = 10.0  # seconds that a new connection has to say who it is
HELLO_LIMIT = 1 << 20  # bytes in which it has to say so: half a kilobyte for each model, and nobody is known yet
ANSWER = 1.0  # seconds that a connected node has to answer before another process takes its place
ANSWER_LOOK = 0.01  # seconds between two looks whether it has
BEATS = 5  # signs of life in the time after which a silent node counts as lost


class Listener(Protocol):
    """Who is told. Called on the event loop's thread, in the order in which things happen."""

    def joined(self, hello: Hello) -> None: ...

    def received(self, rank: int, body: bytes) -> None: ...

    def left(self, rank: int, reason: str) -> None:
        """`reason`: in words. The node may join again."""


class Hub:
    """Listens for the other nodes. `settings`: what they must agree on; `timeout`: seconds of silence."""

    def __init__(self, place: Place, settings: Mapping[str, str], timeout: float, listener: Listener) -> None:
        self._place = place
        self._settings = settings
        self._timeout = timeout
        self._listener = listener
        self._channels: dict[int, Channel] = {}
        self._hellos: dict[int, Hello] = {}  # the last of each rank
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises ConfigError if the control port cannot be listened on."""
        host, port = self._place.master_host, self._place.control_port
        try:
            self._server = await asyncio.start_server(self._accept, host if is_loopback(host) else None, port)
        except OSError as error:
            raise ConfigError(
                f"the leader cannot listen for its nodes on port {port}: {error.strerror or error}; choose another "
                "MASTER_PORT (--rendezvous HOST:PORT)"
            ) from error
        self._spawn(self._watch())

    async def close(self) -> None:
        """End all connections once what was said has been heard, and listen to no one."""
        channels = list(self._channels.values())
        self._channels.clear()
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(channel.drain_and_close(LAST_WORDS) for channel in channels))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, rank: int, body: Body) -> None:
        """To this node, behind what was said to it before. Nothing happens if it has gone: `left` tells so."""
        channel = self._channels.get(rank)
        if channel is not None:
            channel.send(body)

    def broadcast(self, body: Body) -> None:
        for rank in self._channels:
            self.send(rank, body)

    def drop(self, rank: int, reason: str) -> None:
        """Take this node for lost. It may join again."""
        channel = self._channels.pop(rank, None)
        if channel is not None:
            log.warning("node_lost node=%d reason=%s", rank, reason)
            channel.close()
            self._listener.left(rank, reason)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        channel = Channel(reader, writer, size_limit=HELLO_LIMIT)
        try:
            hello = await self._introduced(channel)
            if hello is not None:
                await self._listen(channel, hello)
        finally:
            if not channel.closed:
                channel.close()
            self._tasks.discard(task)

    async def _introduced(self, channel: Channel) -> Hello | None:
        """Who it is, if it belongs here."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                hello = decode_hello(await channel.receive())
        except (TimeoutError, ConnectionError, msgspec.MsgspecError) as error:
            log.warning("stranger_refused reason=%s", error or "it said nothing")
            return None
        reason = why_refused(hello, self._place.world_size, self._settings)
        if reason is None:
            reason = await self._why_taken(hello)
        if reason is None:
            channel.size_limit = SIZE_LIMIT
            return hello
        log.error("node_refused node=%d reason=%s", hello.rank, reason)
        channel.send(encode(Refusal(reason)))
        await channel.drain_and_close(LAST_WORDS)
        return None

    async def _why_taken(self, hello: Hello) -> str | None:
        """Why this node cannot have its rank: another process that has it is alive. One that is not loses it."""
        rank = hello.rank
        while (channel := self._channels.get(rank)) is not None:
            known = self._hellos[rank]
            if known.incarnation != hello.incarnation and await self._answers(channel):
                return (
                    f"rank {rank} is already served by process {known.pid} on {known.host}: this one, process "
                    f"{hello.pid} on {hello.host}, was started with the same rank; check --host-rank, or RANK"
                )
            if self._channels.get(rank) is channel:
                self.drop(rank, "it was started anew")
        return None

    async def _answers(self, channel: Channel) -> bool:
        """Whether the node at the other end is alive. At once where the connection ends or the node is idle."""
        asked = channel.last_heard
        channel.send(PING)
        deadline = time.monotonic() + ANSWER
        while not channel.closed and time.monotonic() < deadline:
            if channel.last_heard > asked:
                return True
            await asyncio.sleep(ANSWER_LOOK)
        return False

    async def _listen(self, channel: Channel, hello: Hello) -> None:
        rank = hello.rank
        self._channels[rank], self._hellos[rank] = channel, hello
        channel.send(encode(Welcome(self._timeout)))
        log.info("node_joined node=%d host=%s pid=%d", rank, hello.host, hello.pid)
        self._listener.joined(hello)
        reason = "its connection ended"
        try:
            while True:
                body = await channel.receive()
                if self._channels.get(rank) is not channel:
                    return
                if body:
                    self._listener.received(rank, body)
        except ConnectionError as error:
            reason = str(error) or reason
        except Exception as error:
            log.exception("message_failed node=%d", rank)
            reason = f"the leader failed at what it said ({type(error).__name__}: {error})"
        finally:
            if self._channels.get(rank) is channel:
                self.drop(rank, reason)

    async def _watch(self) -> None:
        """Say that the leader is here, and take those for lost who say nothing."""
        beat = self._timeout / BEATS
        last = time.monotonic()
        while True:
            await asyncio.sleep(beat)
            now = time.monotonic()
            stalled, last = now - last > 2 * beat, now
            for rank, channel in list(self._channels.items()):
                channel.send(PING)
                silent = now - channel.last_heard
                if silent > self._timeout and not stalled:  # who was asleep itself has heard nobody
                    self.drop(rank, f"nothing was heard of it for {silent:.1f} s")

    def _spawn(self, job: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
