"""What every handler gets: the node, the settings, and what the client said in its headers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web

from computron.api import exchange
from computron.api.protocol import ServedModel, ServingNode
from computron.config import ServerConfig, Task
from computron.errors import BadRequest
from computron.metrics import Metrics

log = logging.getLogger(__name__)
T = TypeVar("T")

PRIORITY = "X-Computron-Priority"
DEADLINE = "X-Computron-Deadline-Ms"
TIMINGS = "X-Computron-Timings"
REQUEST_ID = "X-Request-Id"

LONG_TEXT = 2000  # characters; a tokenizer needs about a millisecond for them
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+=@~-]{1,128}")
ROUTE_OF_TASK = {
    "generate": "/v1/completions or /v1/chat/completions",
    "embed": "/v1/embeddings",
    "classify": "/v1/classify",
    "custom": "/v1/models/{id}/infer",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. `deadline`: seconds from its arrival by which it must have started."""

    request_id: str
    priority: int
    deadline: float | None
    timings: bool


class Context:
    def __init__(self, node: ServingNode, server: ServerConfig, metrics: Metrics) -> None:
        self.node = node
        self.server = server
        self.metrics = metrics
        self.started = int(time.time())
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    def model(self, model: str, task: Task | None) -> ServedModel:
        """The model of that id, which must be for `task`; None: any. Raises ModelNotFound, Unavailable, BadRequest."""
        served = self.node.model(model)
        exchange.current().model = model
        has = served.plan.config.task
        if task is not None and has != task:
            raise BadRequest(f"the model `{model}` has the task {has}; use {ROUTE_OF_TASK[has]}", param="model")
        return served

    async def compute(self, size: int, function: Callable[[], T]) -> T:
        """`function()`: at once if `size` characters are few, otherwise on a thread."""
        if size < LONG_TEXT:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def request_id(request: web.BaseRequest) -> str:
    """The client's own id if it is a sane one, otherwise a new one."""
    given = request.headers.get(REQUEST_ID)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return os.urandom(16).hex()


def read_call(context: Context, request: web.BaseRequest, priority: int | None = None) -> Call:
    """`priority`: vLLM's field of the body, where a lower value is served first; the header, if given, wins.

    Raises BadRequest.
    """
    headers = request.headers
    highest = context.server.max_priority
    asked = _whole_number(PRIORITY, headers.get(PRIORITY))
    if asked is not None and asked > highest:
        raise BadRequest(f"{PRIORITY} must be at most {highest} (server.max_priority), not {asked}", param=PRIORITY)
    if asked is None and priority is not None and -priority > highest:
        raise BadRequest(
            f"`priority` must be at least {-highest} (server.max_priority), not {priority}", param="priority"
        )
    deadline = _whole_number(DEADLINE, headers.get(DEADLINE))
    if deadline is not None and deadline <= 0:
        raise BadRequest(f"{DEADLINE} must be more than 0", param=DEADLINE)
    return Call(
        request_id=exchange.current().request_id,
        priority=asked if asked is not None else -(priority or 0),
        deadline=None if deadline is None else deadline / 1000,
        timings=headers.get(TIMINGS) == "1",
    )


def _whole_number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise BadRequest(f'{name} must be a whole number, not "{text[:50]}"', param=name)
    return int(text)
