"""The master's process: carries out what `Master` orders, and tells it what happens."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import uvloop
from aiohttp import WSMsgType, web

from computron.errors import ComputronError, Unauthorized
from computron.parameter_service.master import rest
from computron.parameter_service.master.events import (
    Close,
    Closed,
    Discard,
    Event,
    Exited,
    Finish,
    Finished,
    Log,
    NotFinished,
    Order,
    Prune,
    Received,
    Send,
    Start,
    Started,
    Tick,
)
from computron.parameter_service.master.journal import Journal, LogUnusable
from computron.parameter_service.master.key import service_key
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.processes import Processes, aggregator_command
from computron.parameter_service.master.scaling import ScalingSettings
from computron.parameter_service.master.state import Limits
from computron.parameter_service.packing import PACKERS
from computron.parameter_service.versions.files import discard, finish
from computron.parameter_service.versions.names import job_folder
from computron.parameter_service.versions.pruning import last_epochs, prune, recover
from computron.parameter_service.wire import messages

log = logging.getLogger(__name__)

TICK = 0.05  # seconds between two looks at what is due
HEARTBEAT = 5.0  # seconds after which a silent link is asked, and half of which it has to answer
LARGEST_MESSAGE = 64 << 20  # bytes
WRONG_KEY = b"this is not the service's key: see --key"
OPEN_TO_ALL = frozenset({"/health", "/metrics"})


@dataclass(frozen=True, slots=True)
class MasterSettings:
    """port 0: any. snapshots, aggregator_memory (bytes): of the aggregators that the master starts.

    key: that aggregators must show; None: the one that is kept beside the log.
    """

    log: Path
    host: str = "127.0.0.1"
    port: int = 8470
    packer: str = "utilisation"
    api_key: str | None = None
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    limits: Limits = field(default_factory=Limits)
    snapshots: Path | None = None
    aggregator_memory: int = 1 << 30
    key: str | None = None


class MasterServer:
    """`async with` it: it listens within. url: where. ticking: ends with the error if the master fails."""

    def __init__(self, settings: MasterSettings) -> None:
        self.settings = settings
        self.url = ""
        self._links: dict[int, web.WebSocketResponse] = {}
        self._outboxes: dict[int, asyncio.Queue[bytes | None]] = {}
        self._numbers = itertools.count(1)
        self._orders: deque[Order] = deque()
        self._busy = False
        self._leaving = False
        self._encode = messages.encoder().encode
        self._decode: Callable[[bytes], messages.ToMaster] = messages.decoder(messages.ToMaster).decode
        self._disk = ThreadPoolExecutor(1, "files")
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    async def __aenter__(self) -> MasterServer:
        """Raises LogUnusable, OSError if the address cannot be listened on."""
        self._journal = Journal(self.settings.log)
        try:
            self._service_key = self.settings.key or service_key(self.settings.log)
            packer = PACKERS[self.settings.packer]()
            self.master = Master(
                self._journal.book, packer, self.settings.scaling, time.monotonic(), limits=self.settings.limits
            )
            await self._listen()
        except BaseException:
            self._journal.close()
            raise
        self._processes = Processes(
            aggregator_command(self.url, self.settings.host, self.settings.aggregator_memory, self.settings.snapshots),
            lambda name: self.tell(Exited(name)),
            {"COMPUTRON_SERVICE_KEY": self._service_key}
            | ({} if self.settings.api_key is None else {"COMPUTRON_API_KEY": self.settings.api_key}),
        )
        for name, started in list(self._journal.book.started.items()):
            self._processes.adopt(name, started.pid, started.began)
        self._recover()
        self.ticking = asyncio.create_task(self._tick())
        log.info("master_started url=%s jobs=%d", self.url, len(self.master.state.jobs))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ticking.cancel()
        self._leaving = True
        for link in list(self._links.values()):
            await link.close()
        await self._runner.cleanup()
        self._processes.close()
        self._disk.shutdown()
        self._journal.close()

    def tell(self, event: Event) -> None:
        """Let the master decide, and carry out what it orders. Raises ComputronError for what is asked wrongly.

        Raises LogUnusable, once and ever after, if the log cannot be written: then nothing is carried out any more.
        """
        self._orders.extend(self.master.handle(event, time.monotonic()))
        if self._busy:
            return  # an order brought this about: what it leads to comes after the rest
        self._busy = True
        try:
            while self._orders:
                self._carry_out(self._orders.popleft())
            self._journal.sync()
            self._journal.shorten()  # now the log has all that the book has
        finally:
            self._busy = False

    def _recover(self) -> None:
        """Take note of snapshots that became complete while no master was there, and of epochs that files are of."""
        if self.settings.snapshots is None:
            return
        try:
            self.master.state.epochs = last_epochs(self.settings.snapshots)
        except OSError as error:
            log.error("not_looked_through folder=%s error=%s", self.settings.snapshots, error)
        for name, job in list(self.master.state.jobs.items()):
            try:
                found = recover(job_folder(self.settings.snapshots, name), len(job.layout.blocks))
            except ComputronError as error:
                log.error("not_recovered job=%s error=%s", name, error)
                continue
            newest = max((saved.step for saved in job.book.counted), default=-1)
            for step, path in [entry for entry in found if entry[0] > newest]:
                self.tell(Finished(name, "", step, str(path), time.time()))

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Log):
            self._journal.append(order.record)
            return
        self._journal.sync()
        match order:
            case Send():
                outbox = self._outboxes.get(order.link)
                if outbox is not None:
                    outbox.put_nowait(self._encode(order.message))
            case Close():
                outbox = self._outboxes.get(order.link)
                if outbox is not None:
                    outbox.put_nowait(None)
            case Start():
                begun = self._processes.start(order.aggregator)
                if begun is not None:
                    self.tell(Started(order.aggregator, *begun))
            case Finish():
                self._in_thread(
                    lambda: finish(Path(order.path), order.history, order.count),
                    lambda: self.tell(_finished(order)),
                    lambda error: self.tell(_not_finished(order, error)),
                )
            case Prune():
                self._remove(lambda: prune(Path(order.path), map(Path, order.keep)))
            case Discard():
                self._remove(lambda: discard(Path(order.path), order.history, order.step))

    def _remove(self, work: Callable[[], object]) -> None:
        self._in_thread(work, lambda: None, lambda error: log.error("not_removed error=%s", error))

    def _in_thread(
        self, work: Callable[[], object], then: Callable[[], None], otherwise: Callable[[BaseException], None]
    ) -> None:
        def done(future: asyncio.Future[object]) -> None:
            error = future.exception()
            if error is None:
                then()
            else:
                otherwise(error)

        asyncio.get_running_loop().run_in_executor(self._disk, work).add_done_callback(done)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.tell(Tick())

    async def _listen(self) -> None:
        app = web.Application(middlewares=[self._edge])
        app.router.add_get("/v1/link", self._link)
        rest.add_routes(app, self)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.settings.host, self.settings.port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @web.middleware
    async def _edge(self, request: web.Request, handler: rest.Handler) -> web.StreamResponse:
        try:
            if self._key is not None and request.path not in OPEN_TO_ALL:
                given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
                if not hmac.compare_digest(given, self._key):
                    raise Unauthorized(
                        "the API key is missing or wrong; send it as `Authorization: Bearer KEY`, or give it to "
                        "`computron parameter-service` by --api-key or COMPUTRON_API_KEY"
                    )
            return await handler(request)
        except ComputronError as error:
            return rest.error_response(error)

    async def _link(self, request: web.Request) -> web.WebSocketResponse:
        """A link of an agent or an aggregator, until it ends."""
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=LARGEST_MESSAGE, compress=False)
        await socket.prepare(request)
        number = next(self._numbers)
        outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._links[number], self._outboxes[number] = socket, outbox
        sender = asyncio.create_task(_send(socket, outbox))
        try:
            async for frame in socket:
                if frame.type is WSMsgType.BINARY:
                    message = self._decode(frame.data)
                    if isinstance(message, messages.Register) and not self._knows_key(message):
                        log.warning("wrong_key aggregator=%s peer=%s", message.address.aggregator, request.remote)
                        await socket.close(code=1008, message=WRONG_KEY)
                        break
                    self.tell(Received(number, message))
        except msgspec.MsgspecError as error:
            log.warning("bad_message peer=%s error=%s", request.remote, error)
            await socket.close(code=1008, message=str(error).encode()[:100])
        except LogUnusable as error:  # the ticks end the master
            await socket.close(message=error.message.encode()[:100])
        finally:
            sender.cancel()
            del self._links[number], self._outboxes[number]
            if not self._leaving:
                with suppress(LogUnusable):
                    self.tell(Closed(number))
        return socket

    def _knows_key(self, message: messages.Register) -> bool:
        return hmac.compare_digest(message.key.encode(), self._service_key.encode())


def _finished(order: Finish) -> Finished:
    return Finished(order.job, order.version, order.step, order.path, time.time())


def _not_finished(order: Finish, error: BaseException) -> NotFinished:
    message = f"{error}; does the master see the folder?"
    return NotFinished(order.job, order.version, order.step, order.path, message, order.history)


async def _send(socket: web.WebSocketResponse, outbox: asyncio.Queue[bytes | None]) -> None:
    while (message := await outbox.get()) is not None:
        try:
            await socket.send_bytes(message)
        except ConnectionError:
            return  # the reader sees the end, too
    await socket.close()


def run(settings: MasterSettings, ready: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM; aggregators that it has started go on. ready: told the URL.

    Raises LogUnusable, OSError if the address cannot be listened on.
    """

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with MasterServer(settings) as server:
            ready(server.url)
            stopped = asyncio.ensure_future(stop.wait())
            await asyncio.wait((stopped, server.ticking), return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if server.ticking.done():
                server.ticking.result()  # a defect: the next master reads the log and goes on

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
