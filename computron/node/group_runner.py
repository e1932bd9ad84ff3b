"""Runs steps on all nodes of a group: the leader's own part of each, and the orders to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from computron.config import GroupConfig
from computron.errors import ComputronError, ExecutionFailed, GroupBroken, StepLost
from computron.execution.requests import StepResult
from computron.execution.steps import StepInput, StepOutput
from computron.group.codec import encode
from computron.group.environment import LEADER
from computron.node import wire
from computron.node.group_steps import GroupStep, GroupSteps
from computron.node.measured_gate import MeasuredGate
from computron.node.peers import Peers
from computron.node.served_model import ServedModel
from computron.node.worker import Worker
from computron.scheduling.actions import Run


class Breakable(Protocol):
    """The group as a whole."""

    @property
    def whole(self) -> bool:
        """Whether every node is there and follows."""

    def break_up(self, reason: str, error: type[GroupBroken]) -> None:
        """Let nobody wait for anybody. `error`: of the steps under way."""


class GroupRunner:
    """All methods belong to the event loop's thread."""

    def __init__(self, worker: Worker, peers: Peers, config: GroupConfig, group: Breakable) -> None:
        self._worker = worker
        self._peers = peers
        self._config = config
        self._group = group
        self.steps = GroupSteps(range(config.nodes), chained=config.pipeline_parallel > 1)

    async def run(
        self, served: ServedModel, action: Run, gate: MeasuredGate, stage_freed: Callable[[], None]
    ) -> tuple[StepResult, float]:
        """As `Crew.run`."""
        executor, worker = served.executor, self._worker
        if served.plan.task == "custom":  # its batch manager's code may take its time, and use the module
            step = await worker.plan(action.model, executor, action.requests, gate)
        else:
            step = executor.plan(action.requests)
        if step is None:
            return executor.empty_result(), 0.0
        try:
            output, seconds = await self._run_planned(action.model, step, gate, stage_freed)
            if executor.overlaps:  # it uses nothing that later steps do, and need not wait for them
                return await worker.beside_compute(executor.finish, step, output), seconds
            return await worker.compute(executor.finish, step, output), seconds
        except BaseException:
            executor.abandon(step)
            raise

    async def _run_planned(
        self, model: str, step: StepInput, gate: MeasuredGate, stage_freed: Callable[[], None]
    ) -> tuple[StepOutput, float]:
        if not self._group.whole:
            raise GroupBroken("the group is being formed anew")
        together = self.steps.begin()
        try:
            self._peers.broadcast(encode(wire.RunStep(together.number, model, step)))
            own = asyncio.ensure_future(self._run_own(together, model, step, gate, stage_freed))
            try:
                await together.done
            finally:
                if together.torn:  # this node may wait for the one that failed
                    at_fault = not isinstance(together.blame(), GroupBroken)
                    error = StepLost if at_fault else GroupBroken
                    self._group.break_up(f"a step of {model} did not end on all nodes", error)
                await own
            assert together.output is not None, "a node of the last stage reports a result"
            return together.output, together.seconds(self._config.tensor_parallel)
        finally:
            self.steps.forget(together)

    async def _run_own(
        self, together: GroupStep, model: str, step: StepInput, gate: MeasuredGate, freed: Callable[[], None]
    ) -> None:
        number = together.number
        try:
            output = await self._worker.run(model, step, gate)
        except ComputronError as error:
            self.steps.fail(number, LEADER, error)
        except BaseException as error:
            self.steps.fail(number, LEADER, ExecutionFailed(f"{type(error).__name__}: {error}"))
            raise
        else:
            self.steps.succeed(number, LEADER, output, gate.waited_seconds())
            if self._config.pipeline_parallel > 1 and not together.done.done():  # the leader is in the first
                freed()
