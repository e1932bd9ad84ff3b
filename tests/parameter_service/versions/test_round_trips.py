"""Any job, cut into any blocks that several owners write: files hold what the tensors are."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from computron.parameter_service.layout import Block, Layout, TensorSpec
from computron.parameter_service.specs import state_names
from computron.parameter_service.versions.files import finish
from computron.parameter_service.versions.names import snapshot_path, version_path
from computron.parameter_service.versions.snapshot import SnapshotReader, SnapshotWriter
from computron.parameter_service.versions.version import VersionWriter
from computron.parameter_service.wire.messages import JobSpec

SHAPES = st.lists(st.integers(1, 60), max_size=2).map(tuple) | st.tuples(st.integers(1, 5000))
TENSORS = st.tuples(SHAPES, st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(0, 1))


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    tensors = draw(st.lists(TENSORS, min_size=1, max_size=6))
    optimizer, momentum, amsgrad = draw(
        st.sampled_from([("sgd", False, False), ("sgd", True, False), ("adamw", False, False), ("adam", False, True)])
    )
    return JobSpec(
        job="team/lm",
        tensors=tuple(TensorSpec(f"layer {n}", *tensor) for n, tensor in enumerate(tensors)),
        optimizer=optimizer,
        block_elements=1024 * draw(st.integers(1, 4)),
        extras=(TensorSpec("seen", (), "int64", 0), TensorSpec("mask", (2, 3), "bool", 0)),
        momentum=momentum,
        amsgrad=amsgrad,
    )


def random_tensors(spec: JobSpec, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator) for tensor in spec.tensors]


def in_block(tensors: list[torch.Tensor], block: Block) -> torch.Tensor:
    """What the block's owner has in memory. NaN stands in the gaps: it must not reach any file."""
    values = torch.full((block.elements,), torch.nan)
    for piece in block.pieces:
        part = tensors[piece.tensor].reshape(-1)[piece.start : piece.start + piece.count]
        values[piece.offset : piece.offset + piece.count] = part
    return values


@settings(max_examples=40, deadline=None)
@given(spec=jobs(), owners=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_snapshot_gives_back_what_was_written_and_is_an_ordinary_file(spec: JobSpec, owners: int, seed: int) -> None:
    blocks = Layout(spec.tensors, spec.block_elements).blocks
    parts = {part: random_tensors(spec, seed + n) for n, part in enumerate(("parameters", *state_names(spec)))}
    with TemporaryDirectory() as folder:
        path = snapshot_path(Path(folder), spec.job, 50, 2)
        writers = [SnapshotWriter(path, spec, step=50, epoch=2) for _ in range(owners)]
        for block in reversed(blocks):
            held = {part: in_block(tensors, block) for part, tensors in parts.items()}
            writers[block.index % owners].write_block(block, held, updates=49)
        for writer in writers:
            writer.sync()
            writer.close()
        finish(path)

        loaded = load_file(path)
        for part, tensors in parts.items():
            for tensor, value in zip(spec.tensors, tensors, strict=True):
                assert loaded.pop(tensor.name if part == "parameters" else f"{tensor.name}.{part}").equal(value)
        if len(parts) > 1:
            assert all(loaded.pop(f"{tensor.name}.step").item() == 49 for tensor in spec.tensors)
        assert not loaded

        with SnapshotReader(path, spec) as reader:
            assert (reader.step, reader.epoch) == (50, 2)
            for block in blocks:
                assert reader.read_updates(block) == (49 if len(parts) > 1 else 0)
                for part, tensors in parts.items():
                    into = torch.full((block.elements,), torch.nan)
                    reader.read_block(block, part, into)
                    assert into.numpy().tobytes() == in_block(tensors, block).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(spec=jobs(), owners=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_version_is_the_file_that_the_library_would_save(spec: JobSpec, owners: int, seed: int) -> None:
    tensors = random_tensors(spec, seed)
    with TemporaryDirectory() as folder:
        path = version_path(Path(folder), spec.job, "v1")
        writers = [VersionWriter(path, spec, version="v1", step=7) for _ in range(owners)]
        for block in Layout(spec.tensors, spec.block_elements).blocks:
            writers[block.index % owners].write_block(block, in_block(tensors, block))
        writers[0].write_extra(0, torch.tensor(7).view(1).numpy().data)
        writers[-1].write_extra(1, bytes([1, 0, 1, 0, 1, 0]))
        for writer in writers:
            writer.sync()
            writer.close()
        finish(path)

        model = {t.name: v.to(getattr(torch, t.dtype)) for t, v in zip(spec.tensors, tensors, strict=True)}
        model |= {"seen": torch.tensor(7), "mask": torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()}
        saved, written = save(model), path.read_bytes()
        size = sum(tensor.nbytes for tensor in model.values())
        assert written[-size:] == saved[-size:]
        with safe_open(path, "pt") as file:
            assert file.metadata() == {
                "format": "pt", "kind": "computron.version", "job": "team/lm", "version": "v1", "step": "7"
            }  # fmt: skip
            assert set(file.keys()) == model.keys()
            assert all(file.get_tensor(name).equal(value) for name, value in model.items())
            assert all(file.get_tensor(name).dtype == value.dtype for name, value in model.items())
