"""What every task's executor can do, and the choice of the one for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from computron.execution.classify import ClassifyExecutor
from computron.execution.custom import CustomExecutor
from computron.execution.embed import EmbedExecutor
from computron.execution.generate import GenerateExecutor
from computron.execution.requests import Job, StepResult
from computron.models import Gate, LoadedModel


class Executor(Protocol):
    """Runs one model.

    `step` belongs to the compute thread. `prepare` and `add` may be called at any time, the rest between steps.
    """

    @property
    def blocks_per_frame(self) -> float:
        """KV cache blocks in a frame, may be a fraction; 0.0 without a cache."""

    @property
    def max_len(self) -> int:
        """Tokens of one sequence at most, prompt and answer together; 0 for models that do not generate."""

    def prepare(self, job: Job) -> int:
        """Check the job against the model; gives the KV blocks that its first step will hold, 0 without a cache.

        Raises BadRequest if it cannot be served as it is, ContextTooLong if it is longer than the model takes.
        """

    def add(self, request: int, job: Job) -> None:
        """Make the request known; it runs when `step` names it."""

    def drop(self, request: int) -> None:
        """Forget the request and free what it holds. Nothing happens if it is not known."""

    def preempt(self, request: int) -> int:
        """Free the request's cache and keep its tokens; gives the KV blocks that its next first step will hold."""

    def set_cache(self, frames: int) -> None:
        """The cache has this many frames from now on; called before frames are unmapped."""

    def step(self, requests: Sequence[int], gate: Gate) -> StepResult:
        """Run one step of these requests; the forward waits at `gate` for the segments that it needs.

        Raises SwapFailed if the gate does (the same step may then be tried again) and ExecutionFailed if the model's
        code does. After either, no request has advanced.
        """


def make_executor(model: LoadedModel, cache: torch.Tensor | None, frame_bytes: int) -> Executor:
    """The executor for the model's task. `cache`: flat uint8, the whole virtual range of the KV cache.

    Raises CheckpointError if the model's architecture cannot be run here.
    """
    match model.plan.task:
        case "generate":
            assert cache is not None, "a model that generates has a cache"
            return GenerateExecutor(model, cache, frame_bytes)
        case "embed":
            return EmbedExecutor(model)
        case "classify":
            return ClassifyExecutor(model)
        case "custom":
            return CustomExecutor(model)
