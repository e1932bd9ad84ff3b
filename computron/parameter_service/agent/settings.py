"""Which job a worker takes part in, and how."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from computron.errors import ConfigError
from computron.parameter_service.layout import BLOCK_ELEMENTS

MASTER_VARIABLE = "COMPUTRON_PARAMETER_SERVICE"
JOB_VARIABLE = "COMPUTRON_JOB"
TOKEN_VARIABLE = "COMPUTRON_JOB_TOKEN"
KEY_VARIABLE = "COMPUTRON_API_KEY"
GRADIENTS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ParameterService:
    """master: its URL. token: the job's secret; the first worker that comes sets it. rank: None to be given one.

    workers: with how many the job starts; min_workers: with fewer it waits for others. gradients: their dtype on the
    way. average: divide the sum of the workers' gradients by their number. snapshot_every: steps that a failure may
    cost; 0: nothing is saved, and the death of an aggregator ends the job. loss_limit: share of its iteration time that
    the job may lose by sharing. find_unused_parameters: a parameter that has no gradient in a step counts as one whose
    gradient is zero, instead of as an error. extras: tensors that are not trained but belong to a published version; of
    a module, its buffers and frozen parameters. shared_memory: False makes everything go by TCP.
    """

    master: str
    job: str
    token: str = ""
    rank: int | None = None
    workers: int = 1
    min_workers: int = 1
    gradients: str = "float32"
    average: bool = True
    snapshot_every: int = 100
    loss_limit: float = 0.1
    block_elements: int = BLOCK_ELEMENTS
    find_unused_parameters: bool = False
    extras: Mapping[str, Tensor] | nn.Module | None = None
    shared_memory: bool = True
    api_key: str | None = field(default_factory=lambda: os.environ.get(KEY_VARIABLE), repr=False)
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if self.gradients not in GRADIENTS:
            raise ConfigError(f"gradients = {self.gradients!r}: choose one of {', '.join(GRADIENTS)}")
        if not 1 <= self.min_workers <= self.workers:
            raise ConfigError(f"min_workers = {self.min_workers}: a number from 1 to workers = {self.workers}")
        if self.rank is not None and self.rank < 0:
            raise ConfigError(f"rank {self.rank} of {self.workers} workers is none")

    @classmethod
    def from_environment(cls) -> ParameterService:
        """As the launcher set it: COMPUTRON_PARAMETER_SERVICE, COMPUTRON_JOB, COMPUTRON_JOB_TOKEN, RANK, WORLD_SIZE."""
        master, job = os.environ.get(MASTER_VARIABLE), os.environ.get(JOB_VARIABLE)
        if not master or not job:
            raise ConfigError(
                f"set {MASTER_VARIABLE} to the master's URL and {JOB_VARIABLE} to the job's name, or pass service="
            )
        rank = os.environ.get("RANK")
        try:
            number, workers = None if rank is None else int(rank), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise ConfigError(f"RANK and WORLD_SIZE must be numbers: {error}") from None
        if number is not None and number >= workers:
            raise ConfigError(f"RANK = {number}, but WORLD_SIZE = {workers}: ranks are 0 to {workers - 1}")
        return cls(master, job, os.environ.get(TOKEN_VARIABLE, ""), number, workers)

    def extra_tensors(self) -> dict[str, Tensor]:
        """By name."""
        if self.extras is None:
            return {}
        if not isinstance(self.extras, nn.Module):
            return dict(self.extras)
        trained = {id(parameter) for parameter in self.extras.parameters() if parameter.requires_grad}
        kept = self.extras.state_dict(keep_vars=True)
        return {
            name: tensor for name, tensor in kept.items() if id(tensor) not in trained and isinstance(tensor, Tensor)
        }
