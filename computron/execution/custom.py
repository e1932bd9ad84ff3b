"""Custom models: the user's batch manager makes the batch and splits the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from computron.errors import BadRequest, SwapFailed
from computron.execution.batching import by_group
from computron.execution.requests import CustomJob, CustomOutput, FailedOutput, Job
from computron.execution.single_pass import SinglePassExecutor
from computron.models import LoadedModel

Batch = Sequence[tuple[int, CustomJob]]
Result = TypeVar("Result")


class _Failed(Exception):
    """User code raised. `together`: whether all requests of the batch fail with it."""

    def __init__(self, message: str, *, together: bool) -> None:
        super().__init__(message)
        self.together = together


class CustomExecutor(SinglePassExecutor[CustomJob]):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self._manager = model.batch_manager

    def _checked(self, job: Job) -> CustomJob:
        if not isinstance(job, CustomJob):
            raise BadRequest("this model takes what its batch manager parses, by /v1/models/{id}/infer", param="model")
        return job

    def _batches(self, items: Batch) -> list[list[tuple[int, CustomJob]]]:
        most = self._model.plan.config.max_batch_size
        return by_group(items, lambda item: self._manager.group(item[1].payload), most)

    def _run(self, batch: Batch) -> list[CustomOutput | FailedOutput]:
        """1. The forward raises: all requests of the batch fail, those of other batches do not.

        2. Making or splitting the batch raises: each request is run by itself, so that only the guilty one fails.
        """
        requests = [request for request, _ in batch]
        try:
            values = self._values([job.payload for _, job in batch])
        except _Failed as error:
            if error.together or len(batch) == 1:
                return [FailedOutput(request, str(error)) for request in requests]
            return [output for item in batch for output in self._run([item])]
        return [CustomOutput(request, value) for request, value in zip(requests, values, strict=True)]

    def _values(self, payloads: Sequence[Any]) -> Sequence[Any]:
        manager = self._manager
        arguments = _call("make_batch", False, lambda: _moved(manager.make_batch(payloads), self._model.device))
        output = _call("the model", True, lambda: self._model.module(*arguments))
        values = _call(
            "split_batch", False, lambda: [_plain(value) for value in manager.split_batch(output, len(payloads))]
        )
        if len(values) != len(payloads):
            raise _Failed(f"split_batch gave {len(values)} values for {len(payloads)} requests", together=True)
        return values


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


def _call(name: str, together: bool, function: Callable[[], Result]) -> Result:
    try:
        return function()
    except SwapFailed:  # nobody's fault here
        raise
    except Exception as error:
        raise _Failed(f"{name} raised {type(error).__name__}: {error}", together=together) from error
