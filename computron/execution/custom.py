"""Custom models: the user's batch manager makes the batch and splits the output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from computron.errors import BadRequest, GroupBroken, SwapFailed
from computron.execution.batching import by_group
from computron.execution.requests import CustomJob, CustomOutput, FailedOutput, Job, Output
from computron.execution.single_pass import SinglePassExecutor, SinglePassRunner
from computron.execution.steps import BatchResult, CustomStep, CustomStepOutput, StepInput, StepOutput
from computron.models import LoadedModel, StackTensors

log = logging.getLogger(__name__)

Batch = Sequence[tuple[int, CustomJob]]
Result = TypeVar("Result")


class _Failed(Exception):
    """User code raised. `together`: all requests of the batch fail with it. `refused`: as the code says, the request is
    to blame.
    """

    def __init__(self, message: str, *, together: bool, refused: bool = False) -> None:
        super().__init__(message)
        self.together = together
        self.refused = refused


@dataclass(slots=True)
class Batches:
    """What a step consists of. refused: those that no batch could be made of."""

    made: list[Batch] = field(default_factory=list)
    refused: list[FailedOutput] = field(default_factory=list)


class CustomExecutor(SinglePassExecutor[CustomJob, Batches]):
    """1. The forward raises: all requests of the batch fail, those of other batches do not.

    2. Making or splitting the batch raises: each request is run by itself, so that only the guilty one fails.

    A group runs nothing twice: where splitting raises, all requests of the batch fail.
    """

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self._manager = model.batch_manager
        self.overlaps = type(self._manager) is StackTensors  # another may remember of a batch how to split it

    def _checked(self, job: Job) -> CustomJob:
        if not isinstance(job, CustomJob):
            raise BadRequest("this model takes what its batch manager parses, by /v1/models/{id}/infer", param="model")
        return job

    def _plan(self, items: Batch) -> tuple[CustomStep, Batches]:
        batches = Batches()
        groups = by_group(
            items, lambda item: self._manager.group(item[1].payload), self._model.plan.config.max_batch_size
        )
        return CustomStep(tuple(arguments for group in groups for arguments in self._made(group, batches))), batches

    def _made(self, batch: Batch, batches: Batches) -> list[tuple[Any, ...]]:
        """The arguments of the batch, or of each of its requests for which they can be made."""
        try:
            arguments = self._make(batch)
        except _Failed as error:
            if len(batch) > 1:
                return [arguments for item in batch for arguments in self._made([item], batches)]
            batches.refused.append(FailedOutput(batch[0][0], str(error), error.refused))
            return []
        batches.made.append(batch)
        return [arguments]

    def _outputs(self, layout: Batches, output: StepOutput) -> list[Output]:
        assert isinstance(output, CustomStepOutput), "the output is another task's"
        results = zip(layout.made, output.results, strict=True)
        return [*layout.refused, *(each for batch, result in results for each in self._answers(batch, result))]

    def _answers(self, batch: Batch, result: BatchResult) -> Sequence[Output]:
        requests = [request for request, _ in batch]
        try:
            values = self._split(batch, result)
        except _Failed as error:
            if error.together or len(batch) == 1 or not self._model.plan.shard.whole:
                return [FailedOutput(request, str(error), error.refused) for request in requests]
            return [output for item in batch for output in self._alone(item)]
        return [CustomOutput(request, value) for request, value in zip(requests, values, strict=True)]

    def _alone(self, item: tuple[int, CustomJob]) -> Sequence[Output]:
        """Run one request again. This node has the whole model, and it has just run."""
        try:
            arguments = self._make([item])
        except _Failed as error:
            return [FailedOutput(item[0], str(error), error.refused)]
        return self._answers([item], run_batch(self._model, arguments))

    def _make(self, batch: Batch) -> tuple[Any, ...]:
        payloads = [job.payload for _, job in batch]
        return _call("make_batch", lambda: tuple(self._manager.make_batch(payloads)))

    def _split(self, batch: Batch, result: BatchResult) -> Sequence[Any]:
        if result.error:
            raise _Failed(result.error, together=True)
        values = _call(
            "split_batch", lambda: [_plain(value) for value in self._manager.split_batch(result.value, len(batch))]
        )
        if len(values) != len(batch):
            raise _Failed(f"split_batch gave {len(values)} values for {len(batch)} requests", together=True)
        return values


class CustomRunner(SinglePassRunner):
    """In a group a module that raises fails the step: no node knows whether it did so on the others too."""

    def _run(self, step: StepInput) -> CustomStepOutput | None:
        assert isinstance(step, CustomStep), "custom models run no other steps"
        results = [run_batch(self._model, arguments) for arguments in step.batches]
        return CustomStepOutput(tuple(results)) if self._model.plan.shard.gives_result else None


def run_batch(model: LoadedModel, arguments: Sequence[Any]) -> BatchResult:
    """What the module gives or, if it is whole, the error that it raises."""
    shard = model.plan.shard
    try:
        value = model.forward(*_moved(arguments, model.device))
        return BatchResult(value if shard.pipeline_parallel == 1 else _fetched(value))
    except (SwapFailed, GroupBroken):  # nobody's fault here
        raise
    except Exception as error:
        if not shard.whole:
            raise
        log.exception("model_code_failed in=forward")
        return BatchResult(error=f"the model raised {type(error).__name__}: {error}")


def _moved(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on the device."""
    match value:
        case torch.Tensor():
            return value.to(device, non_blocking=True)
        case dict():
            return {key: _moved(item, device) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_moved(item, device) for item in value)
        case _:
            return value


def _fetched(value: Any) -> Any:
    """The same structure, of plain containers, with its tensors on the CPU."""
    match value:
        case torch.Tensor():
            return value.cpu()
        case Mapping():
            return {key: _fetched(item) for key, item in value.items()}
        case list() | tuple():
            return [_fetched(item) for item in value]
        case _:
            return value


def _plain(value: Any) -> Any:
    """The same structure with lists in the place of tensors and arrays: here, where it blocks no event loop."""
    match value:
        case torch.Tensor() | np.ndarray() | np.generic():
            return value.tolist()
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _call(name: str, function: Callable[[], Result]) -> Result:
    try:
        return function()
    except SwapFailed:  # nobody's fault here
        raise
    except BadRequest as error:
        raise _Failed(error.message, together=False, refused=True) from error
    except Exception as error:
        log.exception("model_code_failed in=%s", name)
        raise _Failed(f"{name} raised {type(error).__name__}: {error}", together=False) from error
