"""The edge: every request passes it on the way in and out, and every error becomes its HTTP answer here."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import Counter
from typing import ClassVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from computron.api.bodies import answer, error_body
from computron.api.context import REQUEST_ID, Context, request_id
from computron.api.exchange import Exchange, begin
from computron.errors import BadRequest, ClientLimitExceeded, ComputronError, Unauthorized, Unavailable

log = logging.getLogger(__name__)

OPEN_TO_ALL = frozenset({"/health", "/health/ready", "/metrics", "/version"})
CLIENT_LEFT = 499  # for the log alone, as nginx writes it


class RouteNotFound(ComputronError):
    """There is nothing at that path."""

    status = 404
    type = "invalid_request_error"
    code = "route_not_found"


class MethodNotAllowed(ComputronError):
    """The path exists, but not for that method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class HttpError(BadRequest):
    """What aiohttp refused by itself."""

    code: ClassVar[str] = "http_error"


class ClientLimit:
    """Counts the open requests of each client: of an API key, or else of an address."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # 0: no limit
        self._open: Counter[str] = Counter()

    def enter(self, client: str) -> None:
        """Raises ClientLimitExceeded; then nothing is counted."""
        if self._open[client] >= self._limit:
            raise ClientLimitExceeded(
                f"you have {self._limit} requests open, which is the limit; wait until one of them has ended",
                retry_after=1.0,
            )
        self._open[client] += 1

    def leave(self, client: str) -> None:
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]


def edge(context: Context) -> Middleware:
    """The one middleware: request id, API key, limit, errors, log line."""
    key = None if context.server.api_key is None else f"Bearer {context.server.api_key}".encode()
    limit = ClientLimit(context.server.max_requests_per_client) if context.server.max_requests_per_client else None

    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        if key is not None and request.path not in OPEN_TO_ALL:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, key):
                raise Unauthorized("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")
        if limit is None or request.method != "POST":
            return await handler(request)
        client = request.headers.get("Authorization") or request.remote or ""
        limit.enter(client)
        try:
            return await handler(request)
        finally:
            limit.leave(client)

    @web.middleware
    async def pass_edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        exchange = begin(request_id(request))
        status = CLIENT_LEFT
        try:
            response = await admit(request, handler)
            status = response.status
        except asyncio.CancelledError:
            raise
        except ConnectionError:
            # The client is gone in the middle of a stream; aiohttp closes what is left of the connection.
            raise
        except Exception as error:
            answered = _translated(request, error, exchange)
            exchange.error = answered.code
            response = error_response(answered)
            status = response.status
            if isinstance(error, BadRequest) and exchange.model is not None:
                context.metrics.request_refused(exchange.model)
        finally:
            _log_request(request, exchange, status, time.perf_counter() - began)
        if not response.prepared:
            response.headers[REQUEST_ID] = exchange.request_id
        return response

    return pass_edge


def error_response(error: ComputronError) -> web.Response:
    response = answer(error_body(error), status=error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Unavailable):
        response.headers["Connection"] = "close"  # a load balancer should look for another server
        response.force_close()
    return response


def _translated(request: web.Request, error: Exception, exchange: Exchange) -> ComputronError:
    if isinstance(error, ComputronError):
        if error.status >= 500 and error.status != 503:
            log.error("request_failed error=%s", error, exc_info=error)
        return error
    if isinstance(error, web.HTTPNotFound):
        return RouteNotFound(f"there is nothing at {request.method} {request.path}")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.path} does not take {request.method}; it takes {allowed}")
    if isinstance(error, web.HTTPException) and error.status < 500:
        return HttpError(error.reason)
    log.error("request_failed error=%s", type(error).__name__, exc_info=error)
    return ComputronError(f"the server made an error; its log tells more under request id {exchange.request_id}")


def _log_request(request: web.Request, exchange: Exchange, status: int, seconds: float) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    # Probes and scrapes come every few seconds, for ever.
    level = logging.DEBUG if request.path in OPEN_TO_ALL else logging.INFO
    log.log(
        level,
        "request method=%s path=%s status=%d seconds=%.4f model=%s error=%s",
        request.method, request.path, status, seconds, exchange.model or "-", exchange.error or "-",
    )  # fmt: skip
