"""Log lines with fields: `event key=value` as text or as JSON, with the id of the request they belong to.

A call like log.info("swap_in model=%s bytes=%d", model, nbytes) needs nothing more: the fields are read off its format.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import sys
import time
from typing import Any, Literal, TextIO

from computron.api.exchange import current_request_id

GATHERING_SECONDS = 0.05
GATHERED_LINES = 1000

_TEMPLATE = re.compile(r"(\w+)((?: \w+=%\S+)+)")
_FIELD = re.compile(r" (\w+)=%")
_PLAIN = re.compile(r"[^\s\"=]+")


@functools.lru_cache(1024)
def _fields_of(template: object) -> tuple[str, tuple[str, ...]] | None:
    """("swap_in", ("model", "bytes")) of "swap_in model=%s bytes=%d"; None if the message is not of that form."""
    match = _TEMPLATE.fullmatch(template) if isinstance(template, str) else None
    return (match[1], tuple(_FIELD.findall(match[2]))) if match is not None else None


def _event(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """The event's name, or a whole message, and its fields."""
    known = _fields_of(record.msg)
    arguments = record.args if isinstance(record.args, tuple) else ()
    if known is None or len(known[1]) != len(arguments):
        return record.getMessage(), {}
    return known[0], dict(zip(known[1], arguments, strict=True))


def _request_id(record: logging.LogRecord) -> str | None:
    given: str | None = getattr(record, "request_id", None)
    return given if given is not None else current_request_id()


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO computron.node: swap_in model=a bytes=3 request_id=…`

    `node`: rank of this node in its group, which every line names; None if it serves alone.
    """

    def __init__(self, node: int | None) -> None:
        super().__init__()
        self._node = "" if node is None else f" node={node}"

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple) and _fields_of(record.msg) is not None:
            values = [value if isinstance(value, int | float) else _quoted(str(value)) for value in record.args]
            text = record.msg % tuple(values)
        else:
            text = record.getMessage()
        line = f"{_time(record)} {record.levelname} {record.name}: {text}{self._node}"
        request_id = _request_id(record)
        if request_id is not None:
            line += f" request_id={request_id}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, node, event, the event's own fields, request_id, traceback."""

    def __init__(self, node: int | None) -> None:
        super().__init__()
        self._node = {} if node is None else {"node": node}

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _event(record)
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._node,
            "event": event,
            **fields,
        }
        request_id = _request_id(record)
        if request_id is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class GatheringHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of a busy event loop together, a moment later; each write costs more than what it writes.

    A warning, or a line from another thread, is written at once, and what was gathered before it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._gathered: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._gathered.append(self.format(record) + self.terminator)
            if record.levelno < logging.WARNING and len(self._gathered) < GATHERED_LINES:
                if len(self._gathered) == 1:
                    asyncio.get_running_loop().call_later(GATHERING_SECONDS, self.flush)
                return
            self.flush()
        except RuntimeError:  # no loop runs in this thread
            self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        with self.lock or contextlib.nullcontext():
            if self._gathered:
                lines, self._gathered = self._gathered, []
                self.stream.write("".join(lines))
            super().flush()


def set_up_logging(
    level: str, form: Literal["text", "json"], stream: TextIO | None = None, *, node: int | None = None
) -> None:
    """Send all log lines to `stream`, standard error by default, from this level on. `node`: rank in the group."""
    handler = GatheringHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(node) if form == "json" else TextFormatter(node))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries: only what may matter
    # What no formatter here shows need not be found out for every line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.getLogger("computron").setLevel(level.upper())


def flush_logs() -> None:
    """Write the lines that are still gathered."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@functools.lru_cache(4)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@functools.lru_cache(1024)
def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
