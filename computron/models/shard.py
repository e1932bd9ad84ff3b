"""Which part of a model a node holds, and what the parts say to each other during a forward.

Nodes are numbered stage after stage: rank = stage * tensor_parallel + tensor_rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one node holds: a run of its layers (`stage`), and of these a slice (`tensor_rank`)."""

    tensor_parallel: int = 1
    tensor_rank: int = 0
    pipeline_parallel: int = 1
    stage: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.tensor_rank < self.tensor_parallel and 0 <= self.stage < self.pipeline_parallel):
            raise ValueError(f"there is no such part of a model: {self}")

    @classmethod
    def of_rank(cls, rank: int, tensor_parallel: int, pipeline_parallel: int) -> Shard:
        return cls(tensor_parallel, rank % tensor_parallel, pipeline_parallel, rank // tensor_parallel)

    @property
    def whole(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.pipeline_parallel - 1

    @property
    def rank(self) -> int:
        return self.stage * self.tensor_parallel + self.tensor_rank

    @property
    def world(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def gives_result(self) -> bool:
        """Whether this is the node whose output of a forward is taken."""
        return self.last and self.tensor_rank == 0


WHOLE = Shard()


class Communicator(Protocol):
    """What a split module calls during a forward. Every method raises GroupBroken when the group breaks."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the nodes of the stage, the same bits on all of them. `tensor` may be reused for it."""

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The parts of the stage's nodes, joined along the last dimension. `sizes`: the width of each node's part."""

    def send(self, tensor: torch.Tensor) -> None:
        """To the node of the same tensor_rank in the next stage. Returns before it has arrived; `tensor` must stay."""

    def receive(self, like: torch.Tensor) -> torch.Tensor:
        """From the previous stage: a new tensor of the shape, dtype and device of `like`."""
