"""A small job whose second tensor is in several blocks."""

from __future__ import annotations

import pytest

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.wire.messages import JobSpec


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec(
        job="lm",
        tensors=(
            TensorSpec("norm.weight", (40,), "float32", 0),
            TensorSpec("head.weight", (50, 61), "bfloat16", 0),
            TensorSpec("head.bias", (61,), "float16", 1),
        ),
        optimizer="adamw",
        block_elements=1024,
        extras=(TensorSpec("norm.seen", (), "int64", 0), TensorSpec("mask", (2, 3), "bool", 0)),
    )
