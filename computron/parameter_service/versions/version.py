"""A job's published version: its trained tensors in the model's own types, and those that are not trained. One file.

Serving reads it as any checkpoint's safetensors file. A version is of one step of one history, whatever epochs its
writers were in: an epoch that rolls the job back begins another history.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from computron.parameter_service.layout import Block
from computron.parameter_service.versions.casting import as_bytes
from computron.parameter_service.versions.files import Buffer, SharedFile
from computron.parameter_service.versions.header import DTYPES, Tensor
from computron.parameter_service.wire.messages import JobSpec

KIND = "computron.version"
FRAMEWORK = "pt"  # transformers reads no file that does not say so


class VersionWriter:
    """Writes this process's blocks. The other owners of the job's blocks have one of the same path each."""

    def __init__(self, path: Path, spec: JobSpec, *, version: str, step: int, history: int = 0) -> None:
        """path: of `names.version_path`. Raises as SharedFile does."""
        self._spec = spec
        tensors: list[Tensor] = [(t.name, t.dtype, t.shape) for t in (*spec.tensors, *spec.extras)]
        metadata = {"format": FRAMEWORK, "kind": KIND, "job": spec.job, "version": version, "step": str(step)}
        self._file = SharedFile(path, tensors, metadata, history)

    def write_block(self, block: Block, parameters: torch.Tensor) -> None:
        """parameters: the block's fp32 elements, gaps included. Each tensor is cast to its own dtype."""
        for piece in block.pieces:
            dtype: torch.dtype = getattr(torch, self._spec.tensors[piece.tensor].dtype)
            data = parameters[piece.offset : piece.offset + piece.count]
            self._file.write(piece.tensor, piece.start, as_bytes(data, dtype))

    def write_extra(self, extra: int, data: Buffer) -> None:
        """The whole of a tensor that is not trained, in its own dtype. extra: its place in `JobSpec.extras`.

        Raises ValueError if it is of another size.
        """
        tensor = self._spec.extras[extra]
        nbytes = tensor.elements * DTYPES[tensor.dtype].size
        if memoryview(data).nbytes != nbytes:
            raise ValueError(f"{tensor.name} has {nbytes} bytes, not {memoryview(data).nbytes}")
        self._file.write(len(self._spec.tensors) + extra, 0, data)

    def mark(self, blocks: Iterable[int] = (), extras: Iterable[int] = ()) -> None:
        """These have been written and synced. Raises StorageFailed, CheckpointError if the file was discarded."""
        self._file.mark([*extras, *(len(self._spec.extras) + block for block in blocks)])

    def sync(self) -> None:
        """What was written outlasts a loss of power. Raises StorageFailed; it must then be written again."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> VersionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
