"""What a job's blocks consist of, and whether a job can be what it says it is: who asks for one may be mistaken, or
mean harm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from computron.parameter_service.layout import Block, Layout, TensorSpec
from computron.parameter_service.versions.header import DTYPES
from computron.parameter_service.wire.messages import JobSpec

OPTIMIZERS = ("sgd", "adam", "adamw", "sum")
TRAINED = ("float32", "bfloat16", "float16")  # dtypes of tensors that are trained, and of gradients
MOST_DIMENSIONS = 64
MOST_ELEMENTS = 10**12
PARAMETERS = "parameters"  # a block's first part; the others are the optimizer's states


def layout_of(spec: JobSpec) -> Layout:
    """Raises ValueError, which says what is wrong."""
    _one_of("optimizer", spec.optimizer, OPTIMIZERS)
    _one_of("gradients", spec.gradients, TRAINED)
    for tensor in spec.tensors:
        _one_of(f"the dtype of {tensor.name}", tensor.dtype, TRAINED)
    for tensor in spec.extras:
        _one_of(f"the dtype of {tensor.name}", tensor.dtype, DTYPES)
    _check_sizes(spec.tensors, least=1)
    _check_sizes(spec.extras, least=0)
    if any(tensor.group < 0 for tensor in spec.tensors):
        raise ValueError("parameter groups count from 0")
    if spec.snapshot_every < 0 or not 0 <= spec.loss_limit < math.inf:
        raise ValueError("snapshot_every and loss_limit are at least 0")
    if min(spec.workers, spec.min_workers) < 1:
        raise ValueError("a job has at least one worker")
    return Layout(spec.tensors, spec.block_elements)


def state_names(spec: JobSpec) -> tuple[str, ...]:
    """What the optimizer keeps for each element, as torch.optim calls it."""
    if spec.optimizer in ("adam", "adamw"):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if spec.amsgrad else ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if spec.optimizer == "sgd" and spec.momentum else ()


def block_bytes(spec: JobSpec, block: Block) -> int:
    """What it takes in memory: parameters, then each state, one behind the other."""
    return block.nbytes * (1 + len(state_names(spec)))


def gradient_bytes(spec: JobSpec, block: Block) -> int:
    """What a gradient of it takes."""
    return block.elements * DTYPES[spec.gradients].size


def _one_of(what: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} is {value!r:.100}: choose one of {', '.join(known)}")


def _check_sizes(tensors: Sequence[TensorSpec], least: int) -> None:
    total = 0
    for tensor in tensors:
        if len(tensor.shape) > MOST_DIMENSIONS or any(size < least for size in tensor.shape):
            raise ValueError(f"{tensor.name} has a shape that no tensor of a job has")
        total += tensor.elements
        if total > MOST_ELEMENTS:
            raise ValueError(f"the tensors have more than {MOST_ELEMENTS} elements")
