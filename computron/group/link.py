"""A node's end of its control connection: finds the leader, stays with it, and finds it again."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping

import msgspec

from computron.errors import ConfigError
from computron.group.channel import Body, Channel
from computron.group.environment import Place
from computron.group.hello import PING, Hello, Refusal, decode_answer, encode
from computron.group.hub import BEATS, HELLO_TIMEOUT

log = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds that the leader has to come within reach, and again to hear the last words
REPEAT = 30.0  # seconds between two log lines that say the same
RETRY = (0.1, 1.0)  # seconds between two attempts, at first and at most
CONNECTING = 2.0  # seconds that one attempt to connect may take; the kernel asks less and less often in a longer one


class Link:
    """`settings`: what all nodes must agree on. One connection at a time; `connect` makes the next one."""

    def __init__(self, place: Place, settings: Mapping[str, str]) -> None:
        self._place = place
        host, incarnation = socket.gethostname(), uuid.uuid4().hex
        self._hello = encode(Hello(place.rank, place.world_size, dict(settings), host, os.getpid(), incarnation))
        self._channel: Channel | None = None
        self._timeout = HELLO_TIMEOUT
        self._watch: asyncio.Task[None] | None = None
        self.why_lost = ""

    @property
    def connected(self) -> bool:
        return self._channel is not None

    async def connect(self) -> None:
        """Wait for the leader for as long as it takes. Raises ConfigError if it refuses this node."""
        self.close()
        pause, longest = RETRY
        told = "", 0.0  # the last reason in the log, and when
        while True:
            try:
                async with asyncio.timeout(HELLO_TIMEOUT):
                    channel = await self._introduce()
                break
            except (OSError, TimeoutError, msgspec.MsgspecError) as error:
                reason, now = str(error) or type(error).__name__, time.monotonic()
                if pause >= longest and (reason != told[0] or now - told[1] > REPEAT):
                    told = reason, now
                    log.warning(
                        "waiting_for_leader host=%s port=%d reason=%s",
                        self._place.master_host, self._place.control_port, reason,
                    )  # fmt: skip
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        self._channel = channel
        self._watch = asyncio.get_running_loop().create_task(self._keep(channel))
        log.info("leader_found host=%s port=%d", self._place.master_host, self._place.control_port)

    async def _introduce(self) -> Channel:
        async with asyncio.timeout(CONNECTING):
            reader, writer = await asyncio.open_connection(self._place.master_host, self._place.control_port)
        channel = Channel(reader, writer)
        try:
            channel.send(self._hello)
            answer = decode_answer(await channel.receive())
            if isinstance(answer, Refusal):
                raise ConfigError(answer.reason, param="group")
        except BaseException:
            channel.close()
            raise
        self._timeout = answer.timeout
        return channel

    async def messages(self) -> AsyncIterator[bytes]:
        """What the leader says, until the connection ends; `why_lost` then tells why."""
        channel = self._channel
        self.why_lost = ""
        while channel is not None and channel is self._channel:
            try:
                body = await channel.receive()
            except ConnectionError as error:
                self.why_lost = self.why_lost or str(error)
                if channel is self._channel:
                    self._channel = None
                return
            if body != PING:
                yield body
            else:
                channel.send(PING)

    def send(self, body: Body) -> None:
        """To the leader; nothing happens if it is lost."""
        if self._channel is not None:
            self._channel.send(body)

    async def _keep(self, channel: Channel) -> None:
        """Say that this node is here, and take a leader that says nothing for lost."""
        beat = self._timeout / BEATS
        last = time.monotonic()
        while channel is self._channel:
            await asyncio.sleep(beat)
            now = time.monotonic()
            stalled, last = now - last > 2 * beat, now
            channel.send(PING)
            silent = now - channel.last_heard
            if silent > self._timeout and not stalled:
                self.why_lost = f"nothing was heard of the leader for {silent:.1f} s"
                channel.close()
                return

    async def say_last(self, body: Body) -> None:
        """Let the leader hear this, if it is or comes within reach soon, and say nothing more."""
        deadline = time.monotonic() + LAST_WORDS
        while self._channel is None and time.monotonic() < deadline:
            await asyncio.sleep(RETRY[0])
        channel = self._channel
        if channel is not None:
            channel.send(body)
            await channel.drain_and_close(LAST_WORDS)
        self.close()

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if channel is not None:
            channel.close()
