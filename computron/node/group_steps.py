"""Steps that all nodes of a group run together, until the last of them has reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from computron.errors import ComputronError, ExecutionFailed, GroupBroken, SwapFailed
from computron.execution.steps import StepOutput

STRAGGLERS = 1.0  # seconds that the other nodes have to fail too, after the first one has


class GroupStep:
    """`done` ends when all nodes have reported; with an error if one of them failed.

    `torn`: it has failed, and left nodes waiting for each other in the middle of a forward, or something of it on their
    connections.
    """

    def __init__(self, number: int, ranks: Sequence[int]) -> None:
        self.number = number
        self.output: StepOutput | None = None
        self.torn = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.missing = set(ranks)  # nodes that have not reported
        self.failures: dict[int, ComputronError] = {}
        self.succeeded = False  # on some node
        self._ranks = ranks
        self._began = time.monotonic()
        self._reported: dict[
            int, tuple[float, float]
        ] = {}  # of each node: when it was done with the last one; this one
        self._waited = 0.0

    def succeed(self, output: StepOutput | None, waited: float) -> None:
        """`waited`: seconds in which this node waited for pages."""
        self.succeeded = True
        self._waited = max(self._waited, waited)
        if output is not None:
            self.output = output

    def report(self, rank: int, free_since: float, now: float) -> None:
        """A node is done with it; `free_since`: it was done with the step ahead."""
        self.missing.discard(rank)
        self._reported[rank] = free_since, now

    def seconds(self, tensor_parallel: int) -> float:
        """Seconds that the step took on all nodes, without those in which it waited for pages, or in which a stage was
        busy with the step ahead when this one got there.
        """
        there, held_up = self._began, 0.0
        for first in range(0, len(self._ranks), tensor_parallel):
            reports = [self._reported[rank] for rank in self._ranks[first : first + tensor_parallel]]
            held_up += max(0.0, max(free_since for free_since, _ in reports) - there)
            there = max(now for _, now in reports)
        return max(0.0, there - self._began - held_up - self._waited)

    def end(self, error: ComputronError | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
            self.done.exception()  # whoever waits is told; that nobody may wait any more is no fault

    def blame(self) -> ComputronError | None:
        """What is at fault: the model's code or a swap rather than that other nodes then missed this one."""
        for kind in (ExecutionFailed, SwapFailed, ComputronError):
            for error in self.failures.values():
                if isinstance(error, kind):
                    return error
        return None


class GroupSteps:
    """Those under way. All nodes run them in the order in which they began, and so they end in it.

    A step that fails ends after those ahead of it, which are on their way through other nodes and must not be
    disturbed. Unless all nodes fail in the same way, as they do where it is the model's code that raises, it is torn
    then; none behind it ends before `tear` is called. `chained`: nodes hand results on to others, so that a failure
    always leaves something behind.
    """

    def __init__(self, ranks: Sequence[int], *, chained: bool) -> None:
        self._ranks = ranks
        self._chained = chained
        self._next = 0
        self._steps: dict[int, GroupStep] = {}
        self._free_since = dict.fromkeys(ranks, 0.0)
        self._timer: asyncio.TimerHandle | None = None  # of the first one

    def begin(self) -> GroupStep:
        step = self._steps[self._next] = GroupStep(self._next, self._ranks)
        self._next += 1
        return step

    def forget(self, step: GroupStep) -> None:
        """Whoever began it has seen its end."""
        del self._steps[step.number]

    def succeed(self, number: int, rank: int, output: StepOutput | None, waited: float) -> None:
        """`waited`: seconds in which this node waited for pages."""
        if (step := self._steps.get(number)) is not None:
            step.succeed(output, waited)
            self._report(step, rank)

    def fail(self, number: int, rank: int, error: ComputronError) -> None:
        if (step := self._steps.get(number)) is not None:
            step.failures[rank] = error
            self._report(step, rank)

    def tear(self, error: GroupBroken) -> None:
        """The group is gone."""
        self._stop_timer()
        for step in self._steps.values():
            blame = step.blame()
            step.end(error if blame is None or isinstance(blame, GroupBroken) else blame)

    def _report(self, step: GroupStep, rank: int) -> None:
        now = time.monotonic()
        step.report(rank, self._free_since[rank], now)
        self._free_since[rank] = now
        self._end_first()

    def _end_first(self) -> None:
        """End those that can end, the first ones first."""
        for step in self._steps.values():
            if not step.done.done():
                if step.missing and not self._hopeless(step):
                    if step.failures and self._timer is None:
                        self._timer = asyncio.get_running_loop().call_later(STRAGGLERS, self._give_up, step)
                    return
                self._end(step)
            if step.torn:
                return

    def _hopeless(self, step: GroupStep) -> bool:
        """Whether the other nodes do not fail by themselves: they have their pages, or wait for what does not come."""
        return any(
            isinstance(error, SwapFailed) or (self._chained and isinstance(error, ExecutionFailed))
            for error in step.failures.values()
        )

    def _give_up(self, step: GroupStep) -> None:
        self._end(step)
        self._end_first()

    def _end(self, step: GroupStep) -> None:
        self._stop_timer()
        errors = step.failures.values()
        if errors:
            alike = all(isinstance(error, ExecutionFailed) for error in errors)
            step.torn = self._chained or bool(step.missing) or step.succeeded or not alike
        step.end(step.blame())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
