"""The jobs of one HTTP request: queued together, read as they answer, cancelled together."""

from __future__ import annotations

import asyncio
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

    Waiting for the next output may be cancelled without losing one.
    """

    def __init__(self, node: ServingNode, model: str, jobs: Sequence[Job], call: Call) -> None:
        self._node = node
        self._model = model
        self._jobs = jobs
        self._call = call
        self._handles: list[RequestHandle] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._outputs: asyncio.Queue[tuple[int, Output | ComputronError | None]] | None = None
        self._open = len(jobs)

    async def __aenter__(self) -> Submission:
        """Raises what the node raises; then none of the jobs stays queued."""
        call = self._call
        try:
            for index, job in enumerate(self._jobs):
                self._handles.append(
                    self._node.submit(
                        self._model,
                        job,
                        request_id=call.request_id if len(self._jobs) == 1 else f"{call.request_id}-{index}",
                        priority=call.priority,
                        deadline=call.deadline,
                    )
                )
        except BaseException:
            await self._close()
            raise
        current().queued = True
        if len(self._handles) > 1:
            outputs = self._outputs = asyncio.Queue()
            self._pumps = [asyncio.create_task(_pump(outputs, *numbered)) for numbered in enumerate(self._handles)]
        return self

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
            elif isinstance(output, ComputronError):
                raise output
            else:
                return index, output
        raise StopAsyncIteration

    def timings(self) -> Timings:
        """Where the time of the jobs went until now."""
        timings = [handle.timings for handle in self._handles]
        return Timings(
            queue_seconds=_largest(t.queue_seconds for t in timings),
            swap_seconds=max(t.swap_seconds for t in timings),
            swap_bytes=max(t.swap_bytes for t in timings),
            first_output_seconds=_largest(t.first_output_seconds for t in timings),
            total_seconds=_largest(t.total_seconds for t in timings),
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


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
