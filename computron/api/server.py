"""The life of a server: listen, start up, serve until told to stop, drain, end."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
from typing import NoReturn, Protocol

from aiohttp import web

from computron.api.app import make_app
from computron.api.edge import Edge
from computron.api.protocol import ServingNode
from computron.config import ServerConfig
from computron.errors import ComputronError
from computron.metrics import Metrics

log = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds that answers already made have to reach their clients
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CannotListen(ComputronError):
    """The address cannot be listened on. The message says why and what to do."""

    code = "cannot_listen"


class Reporter(Protocol):
    """Shows a person how the start goes."""

    def loading(self, model: str, done: int, total: int) -> None:
        """`done` of `total` bytes are loaded; called from several threads."""

    def ready(self, url: str) -> None: ...

    def close(self) -> None:
        """Leave the terminal in order. Idempotent."""


async def serve(server: ServerConfig, node: ServingNode, metrics: Metrics, reporter: Reporter) -> int:
    """Serve until SIGINT or SIGTERM, and return that signal's number, or until the node has ended by itself: 0.

    A second signal ends the process at once.

    Raises CannotListen, and whatever the node raises when it starts up.
    """
    stop = _Stop(reporter)
    app = make_app(node, server, metrics)
    runner = await listen(app, server.host, server.port)
    try:
        await _startup(node, stop, reporter)
        gc.collect()
        gc.freeze()  # the models and libraries are here to stay: the collector need not look at them again
        reporter.ready(url(runner))
        signal_number = await stop.wait_or(node.ended)
        if signal_number:
            log.info(
                "shutdown signal=%s requests=%d drain_timeout=%.1f",
                signal.Signals(signal_number).name, node.snapshot().requests, server.drain_timeout,
            )  # fmt: skip
        await node.shutdown(server.drain_timeout)
    finally:
        await node.shutdown(0)  # after a start that failed; otherwise it is down already
        await runner.cleanup()
        app.close()
        stop.close()
        reporter.close()
    return signal_number


async def listen(app: Edge, host: str, port: int) -> web.BaseRunner:
    """Listen before models are loaded, so that health checks have an answer and a wrong port costs no time.

    Raises CannotListen.
    """
    runner = web.ServerRunner(app.server(), shutdown_timeout=LAST_WORDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
    except OSError as error:
        await runner.cleanup()
        raise CannotListen(_why_not(error, host, port)) from error
    return runner


def url(runner: web.BaseRunner) -> str:
    """Where clients find the server."""
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _startup(node: ServingNode, stop: _Stop, reporter: Reporter) -> None:
    starting = asyncio.ensure_future(node.startup(reporter.loading))
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        await node.leave()
        stop.end_now()  # nobody is served yet, and threads that load models cannot be interrupted
    stopped.cancel()
    await starting


def _why_not(error: OSError, host: str, port: int) -> str:
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return f"cannot listen on {where}: the port is in use; stop what uses it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"cannot listen on {where}: not permitted; choose a port above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL or error.errno is None or error.errno < 0:
        return f"cannot listen on {where}: this machine has no such address; choose another with --host"
    return f"cannot listen on {where}: {error.strerror}"


class _Stop:
    """The signal to stop. From the second one on there is no patience left."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._loop = asyncio.get_running_loop()
        self._asked: asyncio.Future[int] = self._loop.create_future()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._ask, number)

    def _ask(self, number: int) -> None:
        if self._asked.done():
            self.end_now()
        self._asked.set_result(number)

    async def wait(self) -> int:
        return await asyncio.shield(self._asked)

    async def wait_or(self, event: asyncio.Event) -> int:
        """The signal's number; 0 if the event comes first."""
        other = asyncio.ensure_future(event.wait())
        await asyncio.wait((self._asked, other), return_when=asyncio.FIRST_COMPLETED)
        other.cancel()
        return self._asked.result() if self._asked.done() else 0

    def end_now(self) -> NoReturn:
        self._reporter.close()
        log.warning("ended_at_once")
        logging.shutdown()
        os._exit(128 + self._asked.result())

    def close(self) -> None:
        for number in SIGNALS:
            self._loop.remove_signal_handler(number)
