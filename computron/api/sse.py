"""Server-sent events: what a stream looks like on the wire, also while it waits and when it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Protocol

from aiohttp import web

from computron.api.bodies import encode, error_body
from computron.api.context import REQUEST_ID
from computron.api.exchange import current
from computron.api.submission import Submission
from computron.errors import ComputronError, ExecutionFailed
from computron.execution.requests import Output

log = logging.getLogger(__name__)

KEEP_ALIVE = b": waiting for model\n\n"
DONE = b"data: [DONE]\n\n"


class Chunks(Protocol):
    """Makes the events of one stream."""

    def chunks(self, index: int, output: Output) -> Iterable[Any]: ...

    def last_chunks(self) -> Iterable[Any]: ...


async def stream(
    request: web.BaseRequest, submission: Submission, chunks: Chunks, keep_alive: float
) -> web.StreamResponse:
    """Answer with one event for each chunk, then [DONE].

    Nothing is sent before the first output or `keep_alive` seconds, so that an early error still has its HTTP status;
    from then on an error becomes the last event. A comment after every `keep_alive` seconds without anything else shows
    the client that it is not forgotten.
    """
    exchange = current()
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # proxies must not hold events back
            REQUEST_ID: exchange.request_id,
        }
    )
    answered = False
    try:
        while True:
            try:
                async with asyncio.timeout(keep_alive):
                    index, output = await anext(submission)
            except TimeoutError:
                data = KEEP_ALIVE
            except StopAsyncIteration:
                break
            else:
                answered = True
                data = _events(chunks.chunks(index, output))
            if not response.prepared:
                await response.prepare(request)
            if data:
                await response.write(data)
        if not answered:
            raise ExecutionFailed("the model ended without an answer")
        await response.write(_events(chunks.last_chunks()) + DONE)
    except ComputronError as error:
        if not response.prepared:
            raise
        exchange.error = error.code
        await response.write(_events((error_body(error),)))
    except Exception as error:
        if not response.prepared or isinstance(error, ConnectionError):
            raise
        log.exception("stream_failed")
        exchange.error = ComputronError.code
        await response.write(_events((error_body(ComputronError("the server made an error; see its log")),)))
    await response.write_eof()
    return response


def _events(chunks: Iterable[Any]) -> bytes:
    return b"".join(b"data: " + encode(chunk) + b"\n\n" for chunk in chunks)
