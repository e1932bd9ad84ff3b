"""The edge: every request passes it on the way in and out, and every error becomes its HTTP answer here."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import Counter

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from computron.api.bodies import answer, error_body
from computron.api.context import REQUEST_ID, Context, request_id
from computron.api.exchange import Exchange, begin
from computron.api.routing import Router
from computron.errors import BadRequest, ClientLimitExceeded, ComputronError, Unauthorized, Unavailable

log = logging.getLogger(__name__)

OPEN_TO_ALL = frozenset({"/health", "/health/ready", "/metrics", "/version"})
CLIENT_LEFT = 499  # for the log alone, as nginx writes it


class ClientLimit:
    """Counts the open requests of each client: of an API key, or else of an address."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # 0: no limit
        self._open: Counter[str] = Counter()

    def enter(self, client: str) -> None:
        """Raises ClientLimitExceeded; then nothing is counted."""
        if self._limit and self._open[client] >= self._limit:
            raise ClientLimitExceeded(
                f"you have {self._limit} requests open, which is the limit; wait until one of them has ended",
                retry_after=1.0,
            )
        self._open[client] += 1

    def leave(self, client: str) -> None:
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]


class Edge:
    """Answers requests: request id, API key, limit, route, errors, log line.

    It stands directly on aiohttp's low-level server: an Application's resources and middlewares would cost as much
    again as everything that is done here.
    """

    def __init__(self, context: Context, router: Router) -> None:
        self._context = context
        self._router = router
        key = context.server.api_key
        self._key = None if key is None else f"Bearer {key}".encode()
        self._limit = ClientLimit(context.server.max_requests_per_client)

    def server(self) -> web.Server:
        """To be listened with. A client that leaves cancels its handler, and with it what the handler waits for."""
        return web.Server(self.handle, request_factory=self._make_request, handler_cancellation=True, access_log=None)

    def close(self) -> None:
        self._context.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        began = time.perf_counter()
        exchange = begin(request_id(request))
        status = CLIENT_LEFT
        try:
            response = await self._admit(request)
            status = response.status
        except (asyncio.CancelledError, ConnectionError):
            # The client is gone; aiohttp closes what is left of the connection.
            raise
        except Exception as error:
            answered = _translated(error, exchange)
            exchange.error = answered.code
            response = error_response(answered)
            status = response.status
            if isinstance(error, BadRequest) and exchange.model is not None and not exchange.queued:
                self._context.metrics.request_refused(exchange.model)
        finally:
            _log_request(request, exchange, status, time.perf_counter() - began)
        if not response.prepared:
            response.headers[REQUEST_ID] = exchange.request_id
        return response

    async def _admit(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if self._key is not None and path not in OPEN_TO_ALL:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, self._key):
                raise Unauthorized("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")
        handler, arguments = self._router.find(request.method, path)
        if "Expect" in request.headers:
            await _answer_expectation(request)
        if request.method != "POST":
            return await handler(self._context, request, *arguments)
        client = request.headers.get("Authorization") or request.remote or ""
        self._limit.enter(client)
        try:
            return await handler(self._context, request, *arguments)
        finally:
            self._limit.leave(client)

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        limit = self._context.server.max_body
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=limit)


async def _answer_expectation(request: web.BaseRequest) -> None:
    if request.headers["Expect"].lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # so that aiohttp knows that the answer itself has not begun


def error_response(error: ComputronError) -> web.Response:
    response = answer(error_body(error), status=error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Unavailable):
        response.force_close()  # a load balancer should look for another server
    return response


def _translated(error: Exception, exchange: Exchange) -> ComputronError:
    if isinstance(error, ComputronError):
        if error.status >= 500 and error.status != 503:
            log.error("request_failed error=%s", error, exc_info=error)
        return error
    log.error("request_failed error=%s", type(error).__name__, exc_info=error)
    return ComputronError(f"the server made an error; its log tells more under request id {exchange.request_id}")


def _log_request(request: web.BaseRequest, exchange: Exchange, status: int, seconds: float) -> None:
    # Probes and scrapes come every few seconds, for ever.
    level = logging.DEBUG if request.path in OPEN_TO_ALL else logging.INFO
    if log.isEnabledFor(level):
        log.log(
            level,
            "request method=%s path=%s status=%d seconds=%.4f model=%s error=%s",
            request.method, request.path, status, seconds, exchange.model or "-", exchange.error or "-",
        )  # fmt: skip
