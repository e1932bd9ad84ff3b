"""One training step after another, as the training thread sees it."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from computron.parameter_service.agent.actions import Wish
from computron.parameter_service.agent.parameters import FlatParameters
from computron.parameter_service.agent.session import Session
from computron.parameter_service.agent.settings import ParameterService
from computron.parameter_service.agent.staging import Gradients
from computron.parameter_service.layout import Layout
from computron.parameter_service.wire.messages import Extra, Hyperparameters, JobSpec

log = logging.getLogger(__name__)

Rollback = Callable[[int, int], None]


class Trainer:
    """Belongs to the training thread. steps: that the job has done; lost_steps: that rollbacks took back.

    overlapping: `step` returns when all is staged, and `wait` waits for the parameters.
    """

    def __init__(
        self, service: ParameterService, spec: JobSpec, parameters: Sequence[Tensor], extras: dict[str, Tensor]
    ) -> None:
        """Returns when the parameters are the job's. Raises ParameterServiceError."""
        self.spec = spec
        self.layout = Layout(spec.tensors, spec.block_elements)
        self.on_rollback: Rollback | None = None
        self.overlapping = False
        self._zeros = service.find_unused_parameters
        self._extras = extras
        self._pending = 0  # the step that was committed and not waited for
        self._committed = self._blocked = 0.0  # when the last step was, and seconds of waiting for the service since
        self._lost = 0
        self._flat = FlatParameters(self.layout, parameters)
        self.session = Session(service, spec, self.layout, self._flat)
        self._gradients = Gradients(parameters, [tensor.name for tensor in spec.tensors], self.session.staging)
        self._closer = weakref.finalize(self, _leave, self.session, self._gradients, "the process ends")
        try:
            self.session.wait(lambda: self.session.progress.ready)
        except BaseException:
            self.close("it did not begin")
            raise
        self._take(None)
        if self.steps:
            log.warning("job %s is at step %d already: this worker goes on from there", spec.job, self.steps)

    @property
    def steps(self) -> int:
        return self.session.progress.step

    @property
    def lost_steps(self) -> int:
        return self.session.progress.lost_steps

    @property
    def members(self) -> tuple[int, ...]:
        return self.session.progress.members

    @property
    def skipped(self) -> bool:
        """The last step changed nothing, because a worker's gradient had overflowed."""
        return self.session.skipped

    def step(
        self, groups: tuple[Hyperparameters, ...], *, scale: float, skip: bool = False, version: str | None = None
    ) -> bool:
        """Take a step with the gradients as they are now; False if they were dropped by a rollback.

        Raises ParameterServiceError; ValueError if a gradient is missing.
        """
        session = self.session
        session.check()
        self.wait()
        if self._rolled_back():
            return False
        last = self._gradients.changed(zeros=self._zeros or skip)
        if version is not None:
            self._send_extras(version)
        began = time.monotonic()
        if self._committed:
            session.took(began - self._committed - self._blocked, self._blocked)
        self._committed, self._blocked = began, 0.0
        step = session.working
        session.finish(Wish(step, groups, scale, skip, version), last)
        session.wait(lambda: session.staging.idle)
        self._gradients.forget()
        self._pending = step
        self._blocked += time.monotonic() - began
        if self.overlapping:
            session.begin(step + 1, session.generation)
            return True
        return self.wait()

    def wait(self) -> bool:
        """Until the parameters are those after the last `step`; False if that was dropped by a rollback."""
        if not self._pending:
            return True
        step, session = self._pending, self.session
        progress = session.progress
        began = time.monotonic()
        session.wait(lambda: progress.step >= step or progress.generation != session.generation)
        self._pending = 0
        if self._rolled_back():
            return False
        self._take(step + 1)
        self._blocked += time.monotonic() - began
        return True

    def wait_for(self, tensors: Iterable[int], blocks: Iterable[int]) -> None:
        """Until these parameters are those after the last `step`."""
        if not self._pending:
            return
        step, session = self._pending, self.session
        progress, states = session.progress, [session.progress.blocks[block] for block in blocks]
        began = time.monotonic()
        session.wait(
            lambda: all(state.applied >= step for state in states) or progress.generation != session.generation
        )
        self._blocked += time.monotonic() - began
        if progress.generation == session.generation:
            self._flat.refresh(tensors)

    def norm(self, scale: float) -> float:
        """Euclidean, of the gradient that the workers' gradients add up to. All workers call it. 0 after a rollback."""
        session = self.session
        session.check()
        self.wait()
        progress = session.progress
        if progress.generation != session.generation:
            return 0.0
        generation, step = session.generation, session.working
        session.stage(self._gradients.changed(zeros=self._zeros))
        session.call(lambda: progress.ask_norms(step, scale) if progress.generation == generation else [])
        session.wait(lambda: progress.squared_norm is not None or progress.generation != generation)
        return math.sqrt(progress.squared_norm or 0.0)

    def load(self) -> None:
        """The flat space takes what the parameters are."""
        self._flat.load()

    def take_loaded(self) -> None:
        """The parameters are those that were loaded: make them the model's."""
        self._flat.refresh()

    def close(self, reason: str) -> None:
        if self._closer.detach() is not None:
            _leave(self.session, self._gradients, reason)

    def _take(self, following: int | None) -> None:
        """The parameters are the job's: make them the model's."""
        session = self.session
        self._flat.refresh()
        session.begin(following or session.progress.step + 1, session.progress.generation)

    def _rolled_back(self) -> bool:
        session = self.session
        progress = session.progress
        if progress.generation == session.generation:
            return False
        lost = progress.lost_steps - self._lost
        session.staging.push()
        session.wait(lambda: session.staging.idle and progress.ready)
        self._gradients.forget()
        self._pending = 0
        self._committed = self._blocked = 0.0
        self._take(None)
        self._lost = progress.lost_steps
        log.warning("job %s goes on from step %d: %d steps are lost", self.spec.job, progress.step, lost)
        if self.on_rollback is not None:
            self.on_rollback(progress.step, lost)
        return True

    def _send_extras(self, version: str) -> None:
        session = self.session
        if session.progress.rank != min(self.members):
            return
        copies = [self._extras[spec.name].detach().cpu().clone().contiguous() for spec in self.spec.extras]
        session.give([
            (Extra(self.spec.job, session.progress.epoch, version, session.working, index), _bytes_of(copy))
            for index, copy in enumerate(copies)
        ])  # fmt: skip


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _leave(session: Session, gradients: Gradients, reason: str) -> None:
    gradients.close()
    session.close(reason)
