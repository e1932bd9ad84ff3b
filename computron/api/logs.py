"""Log lines with fields: `event key=value` as text or as JSON, with the id of the request they belong to.

A call like log.info("swap_in model=%s bytes=%d", model, nbytes) needs nothing more: the fields are read off its format.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import re
import sys
from typing import Any, Literal, TextIO

from computron.api.exchange import current_request_id

_TEMPLATE = re.compile(r"(\w+)((?: \w+=%\S+)+)")
_FIELD = re.compile(r" (\w+)=(%\S+)")
_PLAIN = re.compile(r"[^\s\"=]+")


@functools.lru_cache(1024)
def _fields_of(template: str) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """("swap_in", (("model", "%s"), ("bytes", "%d"))); None if the message is not of that form."""
    match = _TEMPLATE.fullmatch(template)
    return (match[1], tuple(_FIELD.findall(match[2]))) if match is not None else None


def _event(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """The event's name, or a whole message, and its fields."""
    known = _fields_of(record.msg) if isinstance(record.msg, str) else None
    arguments = record.args if isinstance(record.args, tuple) else ()
    if known is None or len(known[1]) != len(arguments):
        return record.getMessage(), {}
    event, keys = known
    return event, {key: argument for (key, _), argument in zip(keys, arguments, strict=True)}


def _request_id(record: logging.LogRecord) -> str | None:
    given: str | None = getattr(record, "request_id", None)
    return given if given is not None else current_request_id()


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO computron.node: swap_in model=a bytes=3 request_id=…`"""

    def format(self, record: logging.LogRecord) -> str:
        known = _fields_of(record.msg) if isinstance(record.msg, str) else None
        if known is not None and isinstance(record.args, tuple) and len(record.args) == len(known[1]):
            event, keys = known
            pairs = [f"{key}={_quoted(form % (value,))}" for (key, form), value in zip(keys, record.args, strict=True)]
            text = " ".join([event, *pairs])
        else:
            text = record.getMessage()
        line = f"{_time(record)} {record.levelname} {record.name}: {text}"
        request_id = _request_id(record)
        if request_id is not None:
            line += f" request_id={request_id}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, event, the event's own fields, request_id, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _event(record)
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
            **fields,
        }
        request_id = _request_id(record)
        if request_id is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str, form: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Send all log lines to `stream`, standard error by default, from this level on."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries: only what may matter
    logging.getLogger("computron").setLevel(level.upper())


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
