"""What messages of all kinds speak of: jobs, their hyperparameters, and where aggregators are."""

from __future__ import annotations

import msgspec

from computron.parameter_service.layout import TensorSpec


class Hyperparameters(msgspec.Struct, frozen=True, array_like=True):
    """Of one parameter group at one step, as torch.optim names them. Adam ignores SGD's and the other way round."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Of an aggregator. machine: tells who shares memory with it; path: of its Unix socket there."""

    aggregator: str
    host: str
    port: int
    machine: str
    path: str


class JobSpec(msgspec.Struct, frozen=True):
    """What does not change while a job lives. extras: tensors that are not trained but belong in a version's file.

    optimizer: "sgd", "adam", "adamw", or "sum", which adds gradients up and has no parameters of its own.
    gradients: dtype on the wire. average: divide the sum by the number of workers. snapshot_every: steps that a failure
    may cost; 0: nothing is saved.
    momentum: whether SGD keeps a momentum buffer. amsgrad: whether Adam keeps the largest second moment.
    loss_limit: share of its iteration time that a job may lose by sharing. workers: with how many it starts.
    min_workers: with fewer it waits for others.
    """

    job: str
    tensors: tuple[TensorSpec, ...]
    optimizer: str
    block_elements: int
    extras: tuple[TensorSpec, ...] = ()
    gradients: str = "float32"
    average: bool = True
    momentum: bool = False
    amsgrad: bool = False
    snapshot_every: int = 0
    loss_limit: float = 0.1
    workers: int = 1
    min_workers: int = 1
