"""A block as an aggregator holds it."""

from __future__ import annotations

import math
import threading
import uuid
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from computron.parameter_service.aggregator.kernels import Kernel
from computron.parameter_service.layout import Block
from computron.parameter_service.specs import PARAMETERS, block_bytes, state_names
from computron.parameter_service.wire.messages import Address, JobSpec
from computron.parameter_service.wire.segments import Segment


class Wanted(Protocol):
    """A file that wants the block's state."""

    def take(self, block: HeldBlock) -> None:
        """Copy it, before it changes. The block's lock is held."""


@dataclass(eq=False)
class HeldBlock:
    """memory: names its segment, wherever it goes. applied: the last step it has seen; updates: how many changed it.

    saved: the step whose state a snapshot got from here last. complete: its state is here. scheduled: a step that is
    being applied, 0 for none. wanted: files that want the state as it is now. moving: who is to have it;
    expected_there: and knows. lock: held while the state changes or is copied.
    """

    block: Block
    memory: str
    segment: Segment
    parts: dict[str, Tensor]
    kernel: Kernel
    applied: int = 0
    updates: int = 0
    saved: float = -math.inf
    complete: bool = False
    scheduled: int = 0
    wanted: list[Wanted] = field(default_factory=list)
    moving: Address | None = None
    expected_there: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def create(cls, spec: JobSpec, block: Block) -> HeldBlock:
        """Zeroes. Raises OSError."""
        segment = Segment.create(f"computron:{spec.job}:{block.index}", block_bytes(spec, block))
        return cls.of(spec, block, segment, uuid.uuid4().hex)

    @classmethod
    def of(cls, spec: JobSpec, block: Block, segment: Segment, memory: str) -> HeldBlock:
        names = (PARAMETERS, *state_names(spec))
        parts = {
            name: segment.tensor(torch.float32, place * block.nbytes, block.elements)
            for place, name in enumerate(names)
        }
        return cls(block, memory, segment, parts, Kernel(spec, block, parts))

    def copied(self, spec: JobSpec) -> HeldBlock:
        """The same in memory of its own. Raises OSError."""
        copy = HeldBlock.create(spec, self.block)
        for name, part in self.parts.items():
            copy.parts[name].copy_(part)
        copy.applied, copy.updates, copy.saved, copy.complete = self.applied, self.updates, self.saved, self.complete
        return copy

    def close(self) -> None:
        self.segment.close()
