"""The choice of a model's executor and runner, and a step of both on one node."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from computron.execution.classify import ClassifyExecutor, ClassifyRunner
from computron.execution.custom import CustomExecutor, CustomRunner
from computron.execution.embed import EmbedExecutor, EmbedRunner
from computron.execution.generate import GenerateExecutor
from computron.execution.generate_runner import GenerateRunner
from computron.execution.protocols import Executor, Runner
from computron.execution.requests import StepResult
from computron.models import Gate, LoadedModel


def make_executor(model: LoadedModel, frame_bytes: int, block_bytes: int = 0, capacity: int = 0) -> Executor:
    """The leader's part of running the model. `block_bytes` and `capacity` are those of its runner."""
    match model.plan.task:
        case "generate":
            return GenerateExecutor(model, frame_bytes, block_bytes, capacity)
        case "embed":
            return EmbedExecutor(model)
        case "classify":
            return ClassifyExecutor(model)
        case "custom":
            return CustomExecutor(model)


def make_runner(model: LoadedModel, cache: torch.Tensor | None) -> Runner:
    """A node's part. `cache`: flat uint8, the whole virtual range of the node's KV cache; None without one."""
    match model.plan.task:
        case "generate":
            assert cache is not None, "a model that generates has a cache"
            return GenerateRunner(model, cache)
        case "embed":
            return EmbedRunner(model)
        case "classify":
            return ClassifyRunner(model)
        case "custom":
            return CustomRunner(model)


def run_step(executor: Executor, runner: Runner, requests: Sequence[int], gate: Gate) -> StepResult:
    """One step on one node that holds the whole model, on the compute thread.

    Raises SwapFailed if the gate does (the same step may then be tried again), OutOfMemory if the cache has no room,
    and ExecutionFailed if the model's code raises. After any of them, no request has advanced.
    """
    step = executor.plan(requests)
    if step is None:
        return executor.empty_result()
    try:
        output = runner.run(step, gate)
        assert output is not None, "a whole model gives its result"
        return executor.finish(step, output)
    except BaseException:
        executor.abandon(step)
        raise
