"""The thread on which a node's steps run, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

from computron import _transfer
from computron.errors import ExecutionFailed
from computron.execution.batching import execution_error
from computron.group.communicator import GroupCommunicator
from computron.models.loading import LoadedModel
from computron.node.measured_gate import MeasuredGate

Result = TypeVar("Result")


class ComputeThread:
    """`communicator`: to the group's other nodes, if there are any; `chained`: some of them are other stages.

    `run` and `close` are called on the event loop's thread, the other methods on the thread that computes.
    """

    def __init__(self, backend: _transfer.Backend, communicator: GroupCommunicator | None, *, chained: bool) -> None:
        self._backend = backend
        self._communicator = communicator
        self._chained = chained
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute", initializer=self.use_device)

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call this after what was given before."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def step(self, loaded: LoadedModel, gate: MeasuredGate, function: Callable[[], Result]) -> Result:
        """Call this, which runs the model, and wait for the device."""
        gate.begin()
        loaded.gate = gate  # also for a batch manager, which may use the module before its forward
        try:
            result = function()
            self._settle()
        except BaseException as error:
            self.leave_stages(error)
            with suppress(ExecutionFailed):  # what was raised first is told; `Worker.device_error` tells of the device
                self._synchronize()
            raise
        else:
            self._synchronize()
            return result
        finally:
            gate.end()

    def leave_stages(self, error: BaseException) -> None:
        """A step has failed here: no later one shall take for its own what other stages have sent for that."""
        if self._communicator is not None and self._chained:
            self._communicator.leave(f"a step failed: {error}")

    def use_device(self) -> None:
        """What this thread does from now on without naming a device, it does on this node's. Any thread."""
        if self._backend.kind == "cuda":
            torch.cuda.set_device(self._backend.device_index)

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _settle(self) -> None:
        if self._communicator is not None:
            try:
                self._communicator.settle()
            except RuntimeError as error:
                raise execution_error(error) from error

    def _synchronize(self) -> None:
        """Nothing may read pages or cache after the step, also if it raised half way or gave no token."""
        if self._backend.kind == "cuda":
            try:
                torch.cuda.current_stream(self._backend.device_index).synchronize()
            except RuntimeError as error:
                raise execution_error(error) from error
