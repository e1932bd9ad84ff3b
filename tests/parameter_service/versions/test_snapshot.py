"""Snapshots: what an optimizer keeps, what does not fit is found out, and old ones are removed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from computron.errors import CheckpointError
from computron.parameter_service.layout import Layout, TensorSpec
from computron.parameter_service.specs import state_names
from computron.parameter_service.versions.files import finish
from computron.parameter_service.versions.names import snapshot_path
from computron.parameter_service.versions.snapshot import SnapshotMissing, SnapshotReader, SnapshotWriter
from computron.parameter_service.wire.messages import JobSpec

change = msgspec.structs.replace


@pytest.fixture
def path(tmp_path: Path, spec: JobSpec) -> Path:
    """Of a finished snapshot whose values are all 0."""
    path = snapshot_path(tmp_path, spec.job, 10, 1)
    SnapshotWriter(path, spec, step=10, epoch=1).close()
    finish(path)
    return path


@pytest.mark.parametrize(
    ("optimizer", "momentum", "amsgrad"),
    [("sgd", False, False), ("sgd", True, False), ("adam", False, False), ("adamw", False, True)],
)
def test_states_are_those_of_torch_by_name(spec: JobSpec, optimizer: str, momentum: bool, amsgrad: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    options = {"momentum": 0.9 if momentum else 0.0} if optimizer == "sgd" else {"amsgrad": amsgrad}
    torch_optimizer = kind([parameter], **options)
    parameter.grad = torch.ones(3)
    torch_optimizer.step()
    expected = [name for name, value in torch_optimizer.state[parameter].items() if value is not None]
    names = state_names(change(spec, optimizer=optimizer, momentum=momentum, amsgrad=amsgrad))
    assert sorted(names) == sorted(set(expected) - {"step"})


def test_a_sum_keeps_nothing(spec: JobSpec) -> None:
    assert state_names(change(spec, optimizer="sum")) == ()


def test_a_tensor_called_as_a_state_of_another_is_refused(tmp_path: Path, spec: JobSpec) -> None:
    tensors = (*spec.tensors, TensorSpec("norm.weight.exp_avg", (3,), "float32", 0))
    with pytest.raises(ValueError, match=r"two tensors of the name norm\.weight\.exp_avg"):
        SnapshotWriter(tmp_path / "f", change(spec, tensors=tensors), step=1, epoch=1)


def test_a_part_that_the_optimizer_lacks_is_refused(path: Path, spec: JobSpec) -> None:
    block = Layout(spec.tensors, spec.block_elements).blocks[0]
    with SnapshotReader(path, spec) as reader, pytest.raises(ValueError, match="no part momentum_buffer; they have"):
        reader.read_block(block, "momentum_buffer", torch.zeros(block.elements))


@pytest.mark.parametrize("into", [torch.zeros(7), torch.zeros(1024, dtype=torch.float64)])
def test_a_block_is_read_only_into_its_own_size_and_type(path: Path, spec: JobSpec, into: torch.Tensor) -> None:
    block = Layout(spec.tensors, spec.block_elements).blocks[0]
    with SnapshotReader(path, spec) as reader, pytest.raises(ValueError, match="cannot be read into"):
        reader.read_block(block, "parameters", into)


def test_blocks_of_another_size_can_go_on_from_it(tmp_path: Path, spec: JobSpec) -> None:
    path, values = snapshot_path(tmp_path, spec.job, 1, 1), torch.arange(4096.0)
    whole = Layout(spec.tensors, 4096)
    with SnapshotWriter(path, spec, step=1, epoch=1) as writer:
        for block in whole.blocks:
            writer.write_block(block, {"exp_avg": values[: block.elements]}, updates=5)
    finish(path)
    with SnapshotReader(path, spec) as reader:
        second = Layout(spec.tensors, 1024).blocks[2]
        into = torch.zeros(second.elements)
        reader.read_block(second, "exp_avg", into)
        piece = second.pieces[0]
        first_offset = next(p.offset for b in whole.blocks for p in b.pieces if p.tensor == piece.tensor)
        assert into[: piece.count].equal(values[first_offset + piece.start :][: piece.count])
        assert reader.read_updates(second) == 5


def test_a_missing_or_unfinished_snapshot_cannot_be_read(tmp_path: Path, spec: JobSpec) -> None:
    path = snapshot_path(tmp_path, spec.job, 1, 1)
    SnapshotWriter(path, spec, step=1, epoch=1).close()
    with pytest.raises(SnapshotMissing, match=r"snapshot-1-1\.safetensors: No such file or directory"):
        SnapshotReader(path, spec)


def test_that_a_snapshot_cannot_be_opened_says_nothing_of_it(tmp_path: Path, spec: JobSpec) -> None:
    with pytest.raises(FileNotFoundError):
        SnapshotReader(snapshot_path(tmp_path / "not mounted", spec.job, 1, 1), spec)
    (taken := snapshot_path(tmp_path, spec.job, 1, 1)).mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        SnapshotReader(taken, spec)


def test_a_truncated_snapshot_is_found_out(path: Path, spec: JobSpec) -> None:
    size = path.stat().st_size
    os.truncate(path, size - 5)
    with pytest.raises(CheckpointError, match=rf"truncated, 5 of {size} bytes are missing"):
        SnapshotReader(path, spec)


def test_a_snapshot_that_is_cut_while_it_is_read_is_found_out(path: Path, spec: JobSpec) -> None:
    block = Layout(spec.tensors, spec.block_elements).blocks[-1]
    with SnapshotReader(path, spec) as reader:
        os.truncate(path, 100)
        with pytest.raises(CheckpointError, match="was cut while it was read"):
            reader.read_block(block, "exp_avg_sq", torch.zeros(block.elements))


def test_a_snapshot_of_another_optimizer_or_model_does_not_fit(path: Path, spec: JobSpec) -> None:
    others = {
        "missing in the file and F32": change(spec, amsgrad=True),
        r"F32 \[.*\] .* in the file and missing in the job": change(spec, optimizer="sgd"),
        r"head\.bias.* is F32 \[61\] .* in the file and F32 \[60\]": change(
            spec, tensors=(*spec.tensors[:2], TensorSpec("head.bias", (60,), "float16", 1))
        ),
    }
    for words, other in others.items():
        with pytest.raises(CheckpointError, match=f"does not fit the job: .*{words}"):
            SnapshotReader(path, other)


def test_a_model_of_a_lesser_type_goes_on_from_the_same_snapshot(path: Path, spec: JobSpec) -> None:
    tensors = tuple(change(tensor, dtype="float32") for tensor in spec.tensors)
    SnapshotReader(path, change(spec, tensors=tensors)).close()


def test_another_safetensors_file_is_no_snapshot(tmp_path: Path, spec: JobSpec) -> None:
    save_file({"norm.weight": torch.zeros(40)}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="is no snapshot of format 1"):
        SnapshotReader(tmp_path / "f", spec)
