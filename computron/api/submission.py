"""The jobs of one HTTP request: queued together, read as they answer, cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from computron.api.answers import Timings
from computron.api.context import Call
from computron.api.exchange import current
from computron.api.protocol import ServingNode
from computron.errors import ComputronError
from computron.execution.requests import Job, Output
from computron.node.handle import RequestHandle


class Submission:
    """`async with` queues the jobs; iterating gives (job's index, output); leaving cancels whatever has not ended.

    Of many jobs only as many as two steps take are queued, the next ones as those end, so that a call may have more
    jobs than the model's queue takes. Waiting for the next output may be cancelled without losing one.
    """

    def __init__(self, node: ServingNode, model: str, jobs: Sequence[Job], call: Call) -> None:
        config = node.model(model).plan.config
        twice = 2 * config.max_batch_size
        self._at_once = min(twice, config.max_queue or twice)
        self._node = node
        self._model = model
        self._jobs = jobs
        self._call = call
        self._handles: list[RequestHandle] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._outputs: asyncio.Queue[tuple[int, Output | ComputronError | None]] | None = None
        self._open = len(jobs)
        self._began = time.monotonic()

    async def __aenter__(self) -> Submission:
        """Raises what the node raises; then none of the jobs stays queued."""
        if len(self._jobs) > 1:
            self._outputs = asyncio.Queue()
        try:
            for _ in self._jobs[: self._at_once]:
                self._queue_next()
        except BaseException:
            await self._close()
            raise
        current().queued = True
        return self

    def _queue_next(self) -> None:
        """Raises what the node raises."""
        call, index, deadline = self._call, len(self._handles), self._call.deadline
        if deadline is not None and self._handles:
            deadline -= time.monotonic() - self._began
        handle = self._node.submit(
            self._model,
            self._jobs[index],
            request_id=call.request_id if len(self._jobs) == 1 else f"{call.request_id}-{index}",
            priority=call.priority,
            deadline=deadline,
        )
        self._handles.append(handle)
        if self._outputs is not None:
            self._pumps.append(asyncio.create_task(_pump(self._outputs, index, handle)))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        for handle in self._handles:
            await handle.aclose()

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if self._outputs is None:
            return 0, await anext(self._handles[0])
        while self._open:
            index, output = await self._outputs.get()
            if output is None:
                self._open -= 1
                if len(self._handles) < len(self._jobs):
                    self._queue_next()
            elif isinstance(output, ComputronError):
                raise output
            else:
                return index, output
        raise StopAsyncIteration

    def timings(self) -> Timings:
        """Where the time of the jobs went until now."""
        arrival = self._handles[0].arrival
        timings = [(handle.arrival - arrival, handle.timings) for handle in self._handles]
        return Timings(
            queue_seconds=_latest((late, t.queue_seconds) for late, t in timings),
            swap_seconds=max(t.swap_seconds for _, t in timings),
            swap_bytes=max(t.swap_bytes for _, t in timings),
            first_output_seconds=_latest((late, t.first_output_seconds) for late, t in timings),
            total_seconds=_latest((late, t.total_seconds) for late, t in timings),
        )


async def _pump(
    outputs: asyncio.Queue[tuple[int, Output | ComputronError | None]], index: int, handle: RequestHandle
) -> None:
    try:
        async for output in handle:
            outputs.put_nowait((index, output))
    except ComputronError as error:
        outputs.put_nowait((index, error))
    else:
        outputs.put_nowait((index, None))


def _latest(values: Iterable[tuple[float, float | None]]) -> float | None:
    """`values`: seconds that a job came after the first one, and seconds from then on."""
    return max((late + value for late, value in values if value is not None), default=None)
