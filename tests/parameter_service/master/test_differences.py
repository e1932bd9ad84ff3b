"""What a worker is told whose job is not the one that is there."""

from __future__ import annotations

import msgspec
import pytest

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.master.differences import difference_of
from tests.parameter_service.master.fakes import job_spec

THERE = job_spec(blocks=2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer is adamw there and sgd here"),
        ({"min_workers": 2}, "min_workers is 1 there and 2 here"),
        ({"workers": 2, "loss_limit": 0.5}, None),
        ({"tensors": THERE.tensors[:1]}, "tensor 1 is w1 (float32 [1024], parameter group 0) there and missing here"),
        (
            {"tensors": (TensorSpec("a", (2,), "bfloat16", 1), THERE.tensors[1])},
            "tensor 0 is w0 (float32 [1024], parameter group 0) there and a (bfloat16 [2], parameter group 1) here",
        ),
        (
            {"extras": (TensorSpec("mean", (), "int64", 0),)},
            "tensor that is not trained 0 is missing there and mean (int64 [], parameter group 0) here",
        ),
    ],
)
def test_the_first_difference_is_said(fields: dict[str, object], said: str | None) -> None:
    assert difference_of(THERE, msgspec.structs.replace(THERE, **fields)) == said
