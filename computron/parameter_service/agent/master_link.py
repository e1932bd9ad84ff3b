"""The link to the master: a websocket that is opened again whenever it breaks. Training goes on meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from computron.errors import JobRefused
from computron.parameter_service.wire.messages import (
    Denied,
    Enlist,
    FromMaster,
    Loaded,
    Placement,
    ToMaster,
    decoder,
    encoder,
)

log = logging.getLogger(__name__)

PATH = "/v1/link"
HEARTBEAT = 5.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two tries
REFUSALS = {401, 403, 404}


class MasterLink:
    """enlist: who this worker is and how far, asked for at each connection. received: told of placements and denials.
    It belongs to the event loop's thread.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        enlist: Callable[[], Enlist],
        received: Callable[[Placement | Loaded | Denied], None],
    ) -> None:
        self._url = url.rstrip("/") + PATH
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._enlist = enlist
        self._received = received
        self._encoder, self._decoder = encoder(), decoder(FromMaster)
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def send(self, message: ToMaster) -> None:
        """Dropped if there is no link now."""
        if self._socket is not None and not self._socket.closed:
            try:
                await self._socket.send_bytes(self._encoder.encode(message))
            except ConnectionError as error:
                log.info("a message to the master was lost: %s", error)

    async def run(self) -> None:
        """Until it is cancelled. Raises JobRefused if the master will have nothing to do with us."""
        pause = FIRST_PAUSE
        level = logging.WARNING  # of the next trouble: a master that stays away is told of once
        async with aiohttp.ClientSession(headers=self._headers) as session:
            while True:
                try:
                    async with session.ws_connect(self._url, heartbeat=HEARTBEAT, max_msg_size=0) as socket:
                        await socket.send_bytes(self._encoder.encode(self._enlist()))
                        self._socket = socket
                        pause, level = FIRST_PAUSE, logging.WARNING
                        async for message in socket:
                            self._take(message)
                        log.warning("the master at %s closed the link", self._url)
                except aiohttp.WSServerHandshakeError as error:
                    if error.status in REFUSALS:
                        raise JobRefused(f"{self._url} answers {error.status}: {error.message}") from None
                    log.log(level, "the master at %s answers %s", self._url, error.status)
                except (aiohttp.ClientError, OSError) as error:
                    log.log(level, "the master at %s cannot be reached: %s", self._url, error)
                self._socket, level = None, logging.DEBUG
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)

    def _take(self, message: aiohttp.WSMessage) -> None:
        if message.type is aiohttp.WSMsgType.BINARY:
            decoded = self._decoder.decode(message.data)
            if isinstance(decoded, Placement | Loaded | Denied):
                self._received(decoded)
