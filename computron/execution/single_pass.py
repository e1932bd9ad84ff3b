"""What the executors without a cache have in common: one forward answers a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from computron.execution.batching import execution_error
from computron.execution.requests import Job, Output, StepResult
from computron.models import Gate, LoadedModel

JobType = TypeVar("JobType", bound=Job)


class SinglePassExecutor(ABC, Generic[JobType]):
    """Answers all requests of a step in that step."""

    blocks_per_frame = 0.0
    max_len = 0

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._jobs: dict[int, JobType] = {}

    def prepare(self, job: Job) -> int:
        self._checked(job)
        return 0

    def add(self, request: int, job: Job) -> None:
        self._jobs[request] = self._checked(job)

    def drop(self, request: int) -> None:
        self._jobs.pop(request, None)

    def preempt(self, request: int) -> int:
        return 0

    def set_cache(self, frames: int) -> None:
        assert frames == 0, "this model has no cache"

    @torch.inference_mode()
    def step(self, requests: Sequence[int], gate: Gate) -> StepResult:
        items = [(request, self._jobs[request]) for request in requests if request in self._jobs]
        try:
            self._model.gate = gate
            outputs = [output for batch in self._batches(items) for output in self._run(batch)]
        except Exception as error:
            raise execution_error(error) from error
        for request, _ in items:
            self.drop(request)
        tokens = sum(self._tokens(job) for _, job in items)
        return StepResult(outputs, tuple(request for request, _ in items), batch_size=len(items), tokens=tokens)

    @abstractmethod
    def _checked(self, job: Job) -> JobType:
        """The job, if it is one for this model. Raises BadRequest or ContextTooLong otherwise."""

    @abstractmethod
    def _batches(self, items: Sequence[tuple[int, JobType]]) -> list[list[tuple[int, JobType]]]:
        """(request, job) pairs that share a forward."""

    @abstractmethod
    def _run(self, batch: Sequence[tuple[int, JobType]]) -> Sequence[Output]:
        """One forward; an output for each request of the batch."""

    def _tokens(self, job: JobType) -> int:
        return 0
