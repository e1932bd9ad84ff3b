"""In what a job that is there differs from one that a worker wants to take part in, in words."""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.wire.messages import JobSpec

MAY_DIFFER = ("workers", "loss_limit")


def difference_of(there: JobSpec, wanted: JobSpec) -> str | None:
    """The first that counts. there: of the job; wanted: of the worker."""
    for field in msgspec.structs.fields(JobSpec):
        ours, theirs = getattr(there, field.name), getattr(wanted, field.name)
        if field.name in MAY_DIFFER or ours == theirs:
            continue
        if field.name in ("tensors", "extras"):
            what = "tensor" if field.name == "tensors" else "tensor that is not trained"
            pairs = zip_longest(ours, theirs)
            number, (ours, theirs) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            return f"{what} {number} is {_described(ours)} there and {_described(theirs)} here"
        return f"{field.name} is {ours} there and {theirs} here"
    return None


def _described(tensor: TensorSpec | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tensor.name} ({tensor.dtype} {list(tensor.shape)}, parameter group {tensor.group})"
