"""Gradients of one worker, as they wait for those of the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from computron.parameter_service.aggregator.kernels import DTYPES
from computron.parameter_service.layout import Block, Layout
from computron.parameter_service.wire.messages import JobSpec
from computron.parameter_service.wire.segments import Segment


def as_bytes(values: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return values.view(torch.uint8).numpy().data


class SharedStaging:
    """The worker's own segment: the flat space in the job's wire dtype."""

    def __init__(self, spec: JobSpec, layout: Layout, fd: int) -> None:
        """Takes over `fd`. Raises ValueError if the segment is too small."""
        dtype = DTYPES[spec.gradients]
        self.segment = Segment(fd, layout.elements * dtype.itemsize)
        self._flat = self.segment.tensor(dtype, 0, layout.elements)
        self.segment.close()

    def gradient(self, block: Block) -> Tensor:
        return self._flat[block.start : block.start + block.elements]

    def staged(self, block: Block) -> int:
        """Whoever shares memory has staged everything before it commits."""
        return -1

    def forget(self, block: int) -> None: ...


class PushedStaging:
    """What a worker sends, a buffer for each block that it sent."""

    def __init__(self, spec: JobSpec) -> None:
        self._dtype = DTYPES[spec.gradients]
        self._gradients: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}

    def destination(self, block: Block) -> memoryview:
        """Where a gradient of the block goes. What it held is lost."""
        gradient = self._gradients.get(block.index)
        if gradient is None:
            gradient = self._gradients[block.index] = torch.zeros(block.elements, dtype=self._dtype)
        self._steps[block.index] = 0
        return as_bytes(gradient)

    def came(self, block: int, step: int) -> None:
        self._steps[block] = step

    def gradient(self, block: Block) -> Tensor:
        """Raises KeyError if it has not been pushed."""
        return self._gradients[block.index]

    def staged(self, block: Block) -> int:
        """The step whose gradient is here, 0 if none is."""
        return self._steps.get(block.index, 0)

    def forget(self, block: int) -> None:
        self._gradients.pop(block, None)
        self._steps.pop(block, None)


Staging = SharedStaging | PushedStaging


def missing(stagings: Mapping[int, Staging], block: Block, step: int) -> list[int]:
    """Ranks whose gradient of the block for this step is not here."""
    return [rank for rank, staging in stagings.items() if staging.staged(block) not in (step, -1)]
