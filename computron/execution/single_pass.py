"""What the executors and runners without a cache have in common: one forward answers a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from computron.execution.batching import execution_error
from computron.execution.requests import Job, Output, StepResult
from computron.execution.steps import RowsOutput, StepInput, StepOutput
from computron.models import Gate, LoadedModel

JobType = TypeVar("JobType", bound=Job)
Layout = TypeVar("Layout")


@dataclass(frozen=True, slots=True)
class _Planned(Generic[JobType, Layout]):
    """A step that is on its way, the (request, job) pairs that it answers, and how they lie in it."""

    step: StepInput
    items: list[tuple[int, JobType]]
    layout: Layout


class SinglePassExecutor(ABC, Generic[JobType, Layout]):
    """Answers all requests of a step in that step. Others may be planned before it is finished or abandoned."""

    blocks_per_frame = 0.0
    max_len = 0
    overlaps = True

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._jobs: dict[int, JobType] = {}
        self._planned: dict[int, _Planned[JobType, Layout]] = {}  # by identity of the step

    def limit_cache(self, block_bytes: int, capacity: int) -> None:
        assert capacity == 0, "this model has no cache"

    def prepare(self, job: Job) -> int:
        self._checked(job)
        return 0

    def add(self, request: int, job: Job) -> None:
        self._jobs[request] = self._checked(job)

    def drop(self, request: int) -> None:
        self._jobs.pop(request, None)

    def preempt(self, request: int) -> int:
        return 0

    def set_cache(self, frames: int) -> Mapping[int, int]:
        assert frames == 0, "this model has no cache"
        return {}

    @torch.inference_mode()
    def plan(self, requests: Sequence[int]) -> StepInput | None:
        items = [(request, self._jobs[request]) for request in requests if request in self._jobs]
        if not items:
            return None
        try:
            step, layout = self._plan(items)
        except Exception as error:
            raise execution_error(error) from error
        self._planned[id(step)] = _Planned(step, items, layout)
        return step

    @torch.inference_mode()
    def finish(self, step: StepInput, output: StepOutput) -> StepResult:
        planned = self._planned.get(id(step))
        assert planned is not None, "this step is not under way"
        try:
            outputs = self._outputs(planned.layout, output)
        except Exception as error:
            raise execution_error(error) from error
        del self._planned[id(step)]
        for request, _ in planned.items:
            self.drop(request)
        return StepResult(
            outputs,
            tuple(request for request, _ in planned.items),
            batch_size=len(planned.items),
            tokens=sum(self._tokens(job) for _, job in planned.items),
        )

    def abandon(self, step: StepInput) -> None:
        self._planned.pop(id(step), None)

    def empty_result(self) -> StepResult:
        return StepResult([], ())

    @abstractmethod
    def _checked(self, job: Job) -> JobType:
        """The job, if it is one for this model. Raises BadRequest or ContextTooLong otherwise."""

    @abstractmethod
    def _plan(self, items: Sequence[tuple[int, JobType]]) -> tuple[StepInput, Layout]:
        """The step that answers these (request, job) pairs, and how they lie in it."""

    @abstractmethod
    def _outputs(self, layout: Layout, output: StepOutput) -> list[Output]:
        """An output for each request of a step in which they lie like this."""

    def _tokens(self, job: JobType) -> int:
        return 0


class SinglePassRunner(ABC):
    """A node's part. It has no cache."""

    block_bytes = 0
    capacity = 0

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def move_cache(self, moves: Mapping[int, int]) -> None:
        assert not moves, "this model has no cache"

    @torch.inference_mode()
    def run(self, step: StepInput, gate: Gate) -> StepOutput | None:
        try:
            self._model.gate = gate
            return self._run(step)
        except Exception as error:
            raise execution_error(error) from error

    @abstractmethod
    def _run(self, step: StepInput) -> StepOutput | None:
        """All forwards of the step; None where the result is not."""

    def _rows_output(self, given: Sequence[torch.Tensor | None]) -> RowsOutput | None:
        """`given`: of each batch what came out for its texts or images, [batch, width]."""
        rows = [each for each in given if each is not None]
        if not rows or not self._model.plan.shard.gives_result:
            return None
        return RowsOutput(torch.cat(rows).float().cpu().numpy())
