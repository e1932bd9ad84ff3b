"""What is known of the HTTP request that the current task answers; log lines find its id here."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Exchange:
    """`model`: once it is known to exist. `queued`: the node has its jobs and counts how they end. `error`: the code of
    the error that answered it.
    """

    request_id: str
    model: str | None = None
    queued: bool = False
    error: str | None = None


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def begin(request_id: str) -> Exchange:
    """The current task answers a new request from now on."""
    exchange = Exchange(request_id)
    _current.set(exchange)
    return exchange


def current() -> Exchange:
    """Of the current task; raises LookupError where there is none."""
    exchange = _current.get()
    if exchange is None:
        raise LookupError("this task answers no request")
    return exchange


def current_request_id() -> str | None:
    exchange = _current.get()
    return None if exchange is None else exchange.request_id
