"""One request's way back: outputs in, an async iterator out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from computron.errors import ComputronError
from computron.execution.requests import Output


@dataclass(slots=True)
class RequestTimings:
    """Where a request's time went, in seconds from its arrival. None: has not happened."""

    queue_seconds: float | None = None  # until the first step that it was part of began
    swap_seconds: float = 0.0  # length of the swap-ins of its model that it waited for
    swap_bytes: int = 0  # bytes that those moved
    first_output_seconds: float | None = None
    total_seconds: float | None = None


class RequestHandle:
    """Async iterator over the outputs of one request. Leaving it early (`aclose`) cancels the request.

    Used from the event loop's thread alone.
    """

    __slots__ = (
        "_cancel",
        "_ended",
        "_error",
        "_outputs",
        "_waiter",
        "arrival",
        "last_output",
        "lost_steps",
        "model",
        "number",
        "request_id",
        "timings",
    )

    def __init__(
        self, number: int, request_id: str, model: str, arrival: float, cancel: Callable[[RequestHandle], None]
    ) -> None:
        self.number = number
        self.request_id = request_id
        self.model = model
        self.arrival = arrival
        self.last_output: float | None = None
        self.lost_steps = 0  # in a row, with a group that broke
        self.timings = RequestTimings()
        self._outputs: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: ComputronError | None = None
        self._ended = False
        self._cancel = cancel

    def __repr__(self) -> str:
        return f"RequestHandle({self.number}, {self.request_id}, {self.model}, ended={self._ended})"

    @property
    def ended(self) -> bool:
        return self._ended

    def put(self, output: Output) -> None:
        """Hand over one output. Nothing reaches a request that has ended."""
        if not self._ended:
            self._outputs.append(output)
            self._wake()

    def finish(self, now: float, error: ComputronError | None = None) -> None:
        """No more outputs will come; with `error`, the iterator raises it after those already there."""
        if not self._ended:
            self._ended = True
            self._error = error
            self.timings.total_seconds = now - self.arrival
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> RequestHandle:
        return self

    async def __anext__(self) -> Output:
        while not self._outputs:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._outputs.popleft()

    async def aclose(self) -> None:
        """Cancel the request unless it has ended. Idempotent."""
        if not self._ended:
            self._cancel(self)
