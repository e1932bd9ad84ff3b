"""A communication hook for DistributedDataParallel: the Parameter Service averages the gradients, the user's own
optimizer applies them. DistributedDataParallel reads the hook's annotations, so that they are no strings here.
"""

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from computron.errors import ParameterServiceError
from computron.parameter_service.agent.actions import Wish
from computron.parameter_service.agent.parameters import FlatParameters, trained
from computron.parameter_service.agent.session import Session
from computron.parameter_service.agent.settings import ParameterService
from computron.parameter_service.layout import Layout, TensorSpec
from computron.parameter_service.wire.messages import Hyperparameters, JobSpec

log = logging.getLogger(__name__)

Hook = Callable[["Reduction", GradBucket], Future[Tensor]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A bucket whose sums are on their way. tensors: with where each lies in it, in elements."""

    buffer: Tensor
    tensors: list[tuple[int, int]]
    blocks: list[int]
    step: int
    generation: int
    future: Future[Tensor]


class Reduction:
    """The state of the hook. It lives as long as the model is trained; `close` leaves the job."""

    def __init__(self, service: ParameterService, model: nn.Module) -> None:
        """Returns when all workers have come. Raises ParameterServiceError."""
        parameters = trained(model.parameters())
        names = {id(p): name for name, p in model.named_parameters()}
        tensors = tuple(
            TensorSpec(names[id(p)], tuple(p.shape), str(p.dtype).removeprefix("torch."), 0) for p in parameters
        )
        spec = JobSpec(
            service.job, tensors, "sum", service.block_elements, gradients=service.gradients, average=service.average,
            loss_limit=service.loss_limit, workers=service.workers,
        )  # fmt: skip
        self._layout = Layout(tensors, service.block_elements)
        self._places = {id(p): index for index, p in enumerate(parameters)}
        self._flat = FlatParameters(self._layout, [torch.zeros(p.shape) for p in parameters])
        self._session = Session(service, spec, self._layout, self._flat)
        self._arrived: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._given = 0
        self._thread = threading.Thread(target=self._run, name="computron-reduction", daemon=True)
        self._thread.start()
        self._closer = weakref.finalize(self, self._session.close, "the process ends")
        self._session.wait(lambda: self._session.progress.ready)
        self._begin()

    @property
    def steps(self) -> int:
        return self._session.progress.step

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """The future has the bucket, averaged over the workers."""
        session = self._session
        session.check()
        if self._given == 0:
            self._begin()
        buffer = bucket.buffer()
        tensors, blocks = [], set()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            index = self._places[id(parameter)]
            tensors.append((index, int(gradient.storage_offset() - buffer.storage_offset())))
            blocks.update(self._layout.blocks_of(index))
            session.staging.put(index, gradient)
        session.staging.push()
        self._given = 0 if bucket.is_last() else self._given + 1
        future: Future[Tensor] = Future()
        self._arrived.put(_Waiting(buffer, tensors, sorted(blocks), session.working, session.generation, future))
        return future

    def close(self) -> None:
        """Leave the job."""
        self._arrived.put(None)
        self._closer()

    def _begin(self) -> None:
        session = self._session
        session.wait(lambda: session.progress.ready)
        step = session.progress.step + 1
        session.begin(step, session.progress.generation)
        session.wish(Wish(step, (Hyperparameters(0.0),)))

    def _run(self) -> None:
        while (waiting := self._arrived.get()) is not None:
            try:
                self._take(waiting)
            except Exception as error:  # whoever waits for the future raises it
                waiting.future.set_exception(error)  # type: ignore[arg-type]

    def _take(self, waiting: _Waiting) -> None:
        session = self._session
        progress = session.progress
        states = [progress.blocks[block] for block in waiting.blocks]
        session.wait(
            lambda: all(state.applied >= waiting.step for state in states) or progress.generation != waiting.generation
        )
        if progress.generation != waiting.generation:
            raise ParameterServiceError(
                "the job was rolled back while gradients were averaged: start from a checkpoint"
            )
        for index, offset in waiting.tensors:
            view = self._flat.views[index].reshape(-1)
            waiting.buffer[offset : offset + view.numel()].copy_(view)
        waiting.future.set_result(waiting.buffer)


def ddp_hook(service: ParameterService, model: nn.Module) -> tuple[Reduction, Hook]:
    """For `ddp_model.register_comm_hook(*ddp_hook(service, ddp_model))`. All workers call it."""
    return Reduction(service, model), Reduction.reduce
