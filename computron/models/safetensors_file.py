"""Headers of safetensors files: what stands where, checked before a byte of weights is read."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from computron.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100 << 20
FETCH_AGAIN = "fetch or convert the checkpoint again"


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor's bytes: `nbytes` at `offset` of the file, row-major, little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file, in file order.

    Raises CheckpointError, naming the file and the remedy, if it is missing, truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: truncated, or not a safetensors file; {FETCH_AGAIN}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {FETCH_AGAIN}") from error
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("its header is not an object")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header ({error}); {FETCH_AGAIN}") from error
    for tensor in tensors.values():
        if tensor.offset + tensor.nbytes > size:
            missing = max(t.offset + t.nbytes for t in tensors.values()) - size
            raise CheckpointError(
                f"{path}: truncated, tensor {tensor.name} ends past the end of the file ({missing} bytes are missing); "
                f"{FETCH_AGAIN}"
            )
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def _tensor(path: Path, name: str, entry: Any, data: int) -> FileTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is of type {entry['dtype']}, which is not supported; "
            "convert the checkpoint to bfloat16, float16 or float32"
        )
    dtype = DTYPES[entry["dtype"]]
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"tensor {name} has impossible numbers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} cannot hold {end - begin} bytes")
    return FileTensor(name, dtype, shape, path, data + begin, end - begin)
