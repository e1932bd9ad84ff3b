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
    Unpublished,
    decoder,
    encoder,
)

log = logging.getLogger(__name__)

PATH = "/v1/link"
HEARTBEAT = 5.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two tries
REFUSALS = {401, 403, 404}
KEY_REFUSED = 401
WHERE = "COMPUTRON_PARAMETER_SERVICE says where the master is, and `computron parameter-service master` starts one"


class MasterLink:
    """enlist: who this worker is and how far, asked for at each connection. received: told of placements and denials.
    It belongs to the event loop's thread.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        enlist: Callable[[], Enlist],
        received: Callable[[Placement | Loaded | Unpublished | Denied], None],
    ) -> None:
        self._master = (url if "://" in url else f"http://{url}").rstrip("/")
        self._known = self._away = False  # whether it ever was there, and has been missed since
        self._denied = False
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
        """Until it is cancelled or has been denied. Raises JobRefused if the master will have nothing to do with us."""
        pause = FIRST_PAUSE
        async with aiohttp.ClientSession(headers=self._headers) as session:
            while True:
                try:
                    async with session.ws_connect(self._master + PATH, heartbeat=HEARTBEAT, max_msg_size=0) as socket:
                        await socket.send_bytes(self._encoder.encode(self._enlist()))
                        self._socket = socket
                        pause = FIRST_PAUSE
                        self._found()
                        async for message in socket:
                            self._take(message)
                    if self._denied:
                        return
                    self._missed("it closed the link")
                except aiohttp.WSServerHandshakeError as error:
                    if error.status in REFUSALS:
                        raise JobRefused(self._refusal(error)) from None
                    self._missed(f"it answers {error.status}")
                except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
                    raise JobRefused(f"{self._master} is no URL; {WHERE}") from None
                except (aiohttp.ClientError, OSError) as error:
                    self._missed(str(error))
                self._socket = None
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)

    def _found(self) -> None:
        if self._away:
            log.warning("the master at %s is %s", self._master, "back" if self._known else "there now")
        self._known, self._away = True, False

    def _missed(self, reason: str) -> None:
        """Said once until it is there again."""
        if self._away:
            return
        self._away = True
        if self._known:
            log.warning("the master at %s is away, training goes on without it: %s", self._master, reason)
        else:
            log.warning("no master at %s yet, trying until there is one: %s; %s", self._master, reason, WHERE)

    def _refusal(self, error: aiohttp.WSServerHandshakeError) -> str:
        if error.status == KEY_REFUSED:
            return f"the master at {self._master} asks for another key: set COMPUTRON_API_KEY"
        return f"{self._master} is no master, it answers {error.status} {error.message}; {WHERE}"

    def _take(self, message: aiohttp.WSMessage) -> None:
        if message.type is aiohttp.WSMsgType.BINARY:
            decoded = self._decoder.decode(message.data)
            self._denied = isinstance(decoded, Denied)
            if isinstance(decoded, Placement | Loaded | Unpublished | Denied):
                self._received(decoded)
