"""Headers of safetensors files, byte for byte as the safetensors library (0.8) writes them.

Eight bytes give the header's length; the header is JSON, padded with spaces to a multiple of 8; data follow, with no
gap between tensors: those of wide types first, then by name, so that each is aligned to its own type. The library puts
metadata in random order; here they are sorted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from computron.errors import CheckpointError

LENGTH = 8  # bytes before the header
ALIGNMENT = 8  # of the data, in bytes
MAX_HEADER = 100_000_000  # bytes: the library refuses longer ones


@dataclass(frozen=True, slots=True)
class Dtype:
    """place: in the library's order of types. size: bytes of an element."""

    code: str
    place: int
    size: int


DTYPES: dict[str, Dtype] = {
    "bool": Dtype("BOOL", 0, 1),
    "uint8": Dtype("U8", 1, 1),
    "int8": Dtype("I8", 2, 1),
    "float8_e5m2": Dtype("F8_E5M2", 3, 1),
    "float8_e4m3fn": Dtype("F8_E4M3", 4, 1),
    "int16": Dtype("I16", 5, 2),
    "float16": Dtype("F16", 6, 2),
    "bfloat16": Dtype("BF16", 7, 2),
    "int32": Dtype("I32", 8, 4),
    "float32": Dtype("F32", 9, 4),
    "complex64": Dtype("C64", 10, 8),
    "float64": Dtype("F64", 11, 8),
    "int64": Dtype("I64", 12, 8),
}

# Name, dtype as torch calls it, shape.
Tensor = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's bytes: `nbytes` from `offset` of the file on."""

    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """raw: the bytes before the data. entries: by name. size: of the whole file, in bytes."""

    raw: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def make_header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Header:
    """The same for the same arguments in every process, whatever order they are in.

    Raises ValueError if a name comes twice or a dtype has no place in such a file.
    """
    described: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, dtype, shape in sorted(tensors, key=_in_file_order):
        if name in described:
            raise ValueError(f"a file cannot hold two tensors of the name {name}")
        nbytes = math.prod(shape) * DTYPES[dtype].size
        described[name] = {
            "dtype": DTYPES[dtype].code,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return _parse(len(text).to_bytes(LENGTH, "little") + text)


def read_header(descriptor: int, path: str | os.PathLike[str]) -> Header:
    """Of an open file. Raises CheckpointError if this is no such file or its end is missing."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, LENGTH, 0), "little")
    if size < LENGTH or length > min(size - LENGTH, MAX_HEADER):
        raise CheckpointError(f"{path}: truncated, or not a safetensors file; use another one")
    try:
        header = _parse(os.pread(descriptor, LENGTH + length, 0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header ({error}); use another file") from error
    if size != header.size:
        raise CheckpointError(
            f"{path}: truncated, {header.size - size} of {header.size} bytes are missing; use another file"
        )
    return header


def _in_file_order(tensor: Tensor) -> tuple[int, bytes]:
    name, dtype, _ = tensor
    if dtype not in DTYPES:
        raise ValueError(f"{name} is of type {dtype}, which a safetensors file cannot hold")
    return -DTYPES[dtype].place, name.encode()


def _parse(raw: bytes) -> Header:
    described = json.loads(raw[LENGTH:])
    metadata = described.pop("__metadata__", {})
    entries, end = {}, 0
    for name, entry in described.items():
        start, stop = entry["data_offsets"]
        entries[name] = Entry(name, entry["dtype"], tuple(entry["shape"]), len(raw) + start, stop - start)
        end = max(end, stop)
    return Header(raw, entries, metadata, len(raw) + end)
