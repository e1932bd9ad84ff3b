"""Headers are those of the safetensors library, byte for byte, and are checked when they are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from computron.errors import CheckpointError
from computron.parameter_service.versions.header import DTYPES, LENGTH, make_header, read_header

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(
    tensors=st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1
    ),
    metadata=st.dictionaries(TEXT, TEXT, max_size=1),
)
def test_a_header_has_the_bytes_that_the_library_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    library = save(
        {name: torch.zeros(shape, dtype=getattr(torch, d)) for name, (d, shape) in tensors.items()}, metadata
    )
    header = make_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], metadata)
    assert library[: len(header.raw)] == header.raw
    assert header.size == len(library)


def test_the_order_in_which_tensors_and_metadata_are_told_does_not_matter() -> None:
    tensors = [("a", "float32", (2,)), ("b", "int64", ()), ("c", "float32", (3,))]
    other = make_header(tensors[::-1], {"y": "2", "x": "1"})
    assert make_header(tensors, {"x": "1", "y": "2"}) == other


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"two tensors of the name {name}"):
        make_header([("a", "float32", (1,)), (name, "float32", (1,))], {})


def test_a_type_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="complex128, which a safetensors file cannot hold"):
        make_header([("a", "complex128", (1,))], {})


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        read_header(descriptor, path)
    finally:
        os.close(descriptor)


def test_a_file_that_lacks_its_end_is_found_out_wherever_it_ends(tmp_path: Path) -> None:
    content = save({"a": torch.zeros(4), "b": torch.zeros(2, 3)})
    read(tmp_path / "f", content)
    for size in range(len(content)):
        with pytest.raises(CheckpointError, match="truncated"):
            read(tmp_path / "f", content[:size])


@pytest.mark.parametrize("text", [b"[1]     ", b"{nonsens", b'{"a":{}}', b'{"a":[]}'])
def test_a_header_that_makes_no_sense_is_an_error_that_names_the_file(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"f\.safetensors: corrupt safetensors header"):
        read(tmp_path / "f.safetensors", len(text).to_bytes(LENGTH, "little") + text)
