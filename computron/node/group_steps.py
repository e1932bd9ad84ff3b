"""Steps that all nodes of a group run together, until the last of them has reported."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from computron.errors import ComputronError, ExecutionFailed, GroupBroken, SwapFailed
from computron.execution.steps import StepOutput

STRAGGLERS = 1.0  # seconds that the other nodes have to fail too, after the first one has


class GroupStep:
    """`done` ends when all nodes have reported; with an error if one of them failed.

    A node that fails leaves the others waiting for it in the middle of a forward. Unless all fail in the same way, as
    they do where it is the model's code that raises, they must be freed: `torn` then tells it. `chained`: nodes pass
    their results on to others, so that a failure always leaves something behind.
    """

    def __init__(self, ranks: Iterable[int], *, chained: bool) -> None:
        self._chained = chained
        self.output: StepOutput | None = None
        self.waited = 0.0
        self.torn = False
        self._missing = set(ranks)
        self._failures: dict[int, ComputronError] = {}
        self._succeeded = False
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    def succeed(self, rank: int, output: StepOutput | None, waited: float) -> None:
        """`waited`: seconds in which this node waited for pages."""
        self._succeeded = True
        self.waited = max(self.waited, waited)
        if output is not None:
            self.output = output
        self._reported(rank)

    def fail(self, rank: int, error: ComputronError) -> None:
        self._failures[rank] = error
        self._reported(rank)
        if isinstance(error, SwapFailed):
            self._end()  # the others have their pages, and can only be freed
        if self._timer is None and not self.done.done():
            self._timer = asyncio.get_running_loop().call_later(STRAGGLERS, self._end)

    def tear(self, reason: str) -> None:
        """The group is gone."""
        self._failures.setdefault(-1, GroupBroken(reason))
        self._end()

    def _reported(self, rank: int) -> None:
        self._missing.discard(rank)
        if not self._missing:
            self._end()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.done.done():
            return
        if not self._failures:
            self.done.set_result(None)
            return
        alike = all(isinstance(error, ExecutionFailed) for error in self._failures.values())
        self.torn = self._chained or bool(self._missing) or self._succeeded or not alike
        self.done.set_exception(self._reason())
        self.done.exception()  # whoever waits is told; that nobody may wait any more is no fault

    def _reason(self) -> ComputronError:
        """What is to blame: the model's code or a swap rather than that the others then missed a node."""
        for kind in (ExecutionFailed, SwapFailed):
            for error in self._failures.values():
                if isinstance(error, kind):
                    return error
        return next(iter(self._failures.values()))
