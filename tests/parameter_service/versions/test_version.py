"""Versions: rounding to the model's types, and extras of the right size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from computron.parameter_service.layout import Layout
from computron.parameter_service.versions.files import finish
from computron.parameter_service.versions.version import VersionWriter
from computron.parameter_service.wire.messages import JobSpec


def test_parameters_are_rounded_as_torch_rounds(tmp_path: Path, spec: JobSpec) -> None:
    block = next(b for b in Layout(spec.tensors, spec.block_elements).blocks if b.pieces[0].tensor == 1)
    between = torch.tensor([1.00390625, 1.01171875, 3e38, -1e-40, float("inf"), float("nan")])  # two ties first
    values = between.repeat(block.elements)[: block.elements]
    with VersionWriter(tmp_path / "f", spec, version="v1", step=1) as writer:
        writer.write_block(block, values)
    finish(tmp_path / "f")
    written = load_file(tmp_path / "f")["head.weight"].flatten()[: block.pieces[0].count]
    assert written.view(torch.int16).equal(values[: block.pieces[0].count].bfloat16().view(torch.int16))
    assert written[:2].tolist() == [1.0, 1.015625]


@pytest.mark.parametrize("size", [5, 7])
def test_an_extra_of_another_size_than_its_tensor_is_refused(tmp_path: Path, spec: JobSpec, size: int) -> None:
    with (
        VersionWriter(tmp_path / "f", spec, version="v1", step=1) as writer,
        pytest.raises(ValueError, match=f"mask has 6 bytes, not {size}"),
    ):
        writer.write_extra(1, bytes(size))
