"""The connection to the master: kept up for ever, because aggregators go on without it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from computron.parameter_service.wire.messages import FromMaster, Register, decoder, encoder

log = logging.getLogger(__name__)

FIRST_RETRY, LAST_RETRY = 0.1, 0.5  # seconds; a short break must be over before the master gives up waiting
HEARTBEAT = 5.0  # seconds
LARGEST = 64 << 20  # bytes of a message

_encode = encoder().encode
_decoder = decoder(FromMaster)


class MasterLink:
    """register: what this aggregator is and has, asked for at each connection. received: told what the master sends.
    away: told when it cannot be reached.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        register: Callable[[], Register],
        received: Callable[[Any], None],
        away: Callable[[], None],
    ) -> None:
        self._url = f"{url.rstrip('/')}/v1/link"
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._register = register
        self._received = received
        self._away = away
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._unsent: asyncio.Queue[Any] = asyncio.Queue()

    def send(self, message: Any) -> None:
        """Dropped while there is no connection: `register` tells at the next one what is here."""
        if self._socket is not None:
            self._unsent.put_nowait(message)

    async def flush(self) -> bool:
        """Wait until all has been sent. False if the connection ended before, or there is none."""
        if self._socket is None:
            return False
        sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unsent.put_nowait(sent)
        return await sent

    async def run(self) -> None:
        """Until cancelled."""
        delay, told = FIRST_RETRY, ""
        async with aiohttp.ClientSession(headers=self._headers) as session:
            while True:
                try:
                    async with session.ws_connect(self._url, heartbeat=HEARTBEAT, max_msg_size=LARGEST) as socket:
                        if await self._talk(socket):
                            delay, told = FIRST_RETRY, ""
                        reason = f"closed ({socket.close_code})"
                        if socket.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION:
                            reason += ": is the service's key that of the file that the master names at its start?"
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    reason = str(error)
                finally:
                    self._socket = None
                if reason != told:  # it may be away for long
                    log.warning("no connection to the master: %s; trying again and again", reason)
                told = reason
                self._away()
                await asyncio.sleep(delay)
                delay = min(2 * delay, LAST_RETRY)

    async def _talk(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
        """Until the connection ends. Whether the master has said anything."""
        heard = False
        self._unsent = asyncio.Queue()
        await socket.send_bytes(_encode(self._register()))
        self._socket = socket
        writer = asyncio.ensure_future(self._write(socket))
        try:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    if not heard:
                        log.info("connected to the master")
                    heard = True
                    self._take(message.data)
        finally:
            self._socket = None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            while not self._unsent.empty():
                _answer(self._unsent.get_nowait(), sent=False)
        return heard

    def _take(self, data: bytes) -> None:
        try:
            message = _decoder.decode(data)
        except msgspec.MsgspecError as error:
            log.error("a message of the master's cannot be read: %s", error)
            return
        self._received(message)

    async def _write(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            message = await self._unsent.get()
            if not isinstance(message, asyncio.Future):
                await socket.send_bytes(_encode(message))
            _answer(message, sent=True)


def _answer(message: Any, *, sent: bool) -> None:
    """To who waits for this place of the queue."""
    if isinstance(message, asyncio.Future) and not message.done():
        message.set_result(sent)
