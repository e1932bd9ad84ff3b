"""A job that cannot be is refused before anything is made for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.specs import layout_of
from computron.parameter_service.wire.messages import JobSpec

SPEC = JobSpec("job", (TensorSpec("a", (2000,), "float32", 0),), "adamw", 1024)


def tensor(*shape: int, dtype: str = "float32", group: int = 0) -> tuple[TensorSpec, ...]:
    return (TensorSpec("a", shape, dtype, group),)


def test_a_sound_job_has_its_layout() -> None:
    extras = (TensorSpec("count", (), "int64", 0), TensorSpec("none", (0, 3), "bool", 0))
    assert len(layout_of(msgspec.structs.replace(SPEC, extras=extras)).blocks) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensors": tensor(10**12 + 1), "block_elements": 1 << 24}, "more than 1000000000000 elements"),
        ({"tensors": tensor(*[2**62] * 60)}, "more than 1000000000000 elements"),
        ({"tensors": tensor(*[1] * 65)}, "no tensor of a job has"),
        ({"tensors": tensor(-5, -5)}, "no tensor of a job has"),
        ({"tensors": tensor(10**12)}, "more than 262144 blocks"),
        ({"tensors": tensor(5, dtype="int64")}, "the dtype of a is 'int64'"),
        ({"tensors": tensor(5, group=-1)}, "count from 0"),
        ({"extras": tensor(5, dtype="object")}, "the dtype of a is 'object'"),
        ({"extras": tensor(-1)}, "no tensor of a job has"),
        ({"optimizer": "magic"}, "optimizer is 'magic'"),
        ({"gradients": "int8"}, "gradients is 'int8'"),
        ({"block_elements": 1 << 25}, "at most 16777216"),
        ({"block_elements": 0}, "a multiple of 1024"),
        ({"snapshot_every": -1}, "at least 0"),
        ({"loss_limit": float("nan")}, "at least 0"),
        ({"workers": 0}, "at least one worker"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layout_of(msgspec.structs.replace(SPEC, **changes))
