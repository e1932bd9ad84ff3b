"""A job's snapshot: what its blocks consist of after one step, to go on from. One file, written by all owners.

For each trained tensor the file holds `<name>`, its fp32 parameters, and where the optimizer has a memory
`<name>.<state>`, each state as torch.optim names it, in fp32, and `<name>.step`, how many updates the tensor has seen
(int64). The last is not the job's step: skipped steps do not count, and a loaded `state_dict` brings its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from computron.errors import CheckpointError
from computron.parameter_service.layout import Block
from computron.parameter_service.specs import PARAMETERS, state_names
from computron.parameter_service.versions.casting import as_bytes
from computron.parameter_service.versions.files import SharedFile
from computron.parameter_service.versions.header import Entry, Header, Tensor, make_header, read_header
from computron.parameter_service.wire.messages import JobSpec

KIND = "computron.snapshot"
FORMAT = "1"
STEP = "step"


class _Places:
    """Which tensor of the file holds what. A part is "parameters" or a state's name."""

    def __init__(self, spec: JobSpec) -> None:
        """Raises ValueError if a tensor is called as another's state is."""
        states = state_names(spec)
        self._parts = {part: number for number, part in enumerate((PARAMETERS, *states))}
        self._count = len(spec.tensors)
        names = [(t.name, t.shape) for t in spec.tensors]
        self.tensors: list[Tensor] = [(name, "float32", shape) for name, shape in names]
        self.tensors += [(f"{name}.{state}", "float32", shape) for state in states for name, shape in names]
        if states:
            self.tensors += [(f"{name}.{STEP}", "int64", ()) for name, _ in names]

    @property
    def has_steps(self) -> bool:
        return len(self._parts) > 1

    def of(self, part: str, tensor: int) -> int:
        if part not in self._parts:
            raise ValueError(f"this job's blocks have no part {part}; they have {', '.join(self._parts)}")
        return self._parts[part] * self._count + tensor

    def of_step(self, tensor: int) -> int:
        return len(self._parts) * self._count + tensor


class SnapshotWriter:
    """Writes this process's blocks. The other owners of the job's blocks have one of the same path each."""

    def __init__(self, path: Path, spec: JobSpec, *, step: int, epoch: int) -> None:
        """path: of `names.snapshot_path`. Raises as SharedFile does."""
        self._places = _Places(spec)
        metadata = {"kind": KIND, "format": FORMAT, "job": spec.job, "optimizer": spec.optimizer}
        self._file = SharedFile(path, self._places.tensors, metadata | {"step": str(step), "epoch": str(epoch)})

    def write_block(self, block: Block, parts: Mapping[str, torch.Tensor], updates: int = 0) -> None:
        """parts: of each part the block's elements, fp32, gaps included. updates: that the block has seen."""
        for part, values in parts.items():
            for piece in block.pieces:
                data = values[piece.offset : piece.offset + piece.count]
                self._file.write(self._places.of(part, piece.tensor), piece.start, as_bytes(data, torch.float32))
        if self._places.has_steps:
            for piece in block.pieces:
                self._file.write(self._places.of_step(piece.tensor), 0, updates.to_bytes(8, "little"))

    def mark(self, blocks: Iterable[int]) -> None:
        """These blocks have been written and synced: `recover` counts them. Raises as SharedFile does."""
        self._file.mark(blocks)

    def sync(self) -> None:
        """What was written outlasts a loss of power. Raises StorageFailed; the blocks must then be written again."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SnapshotMissing(CheckpointError):
    """It is not in its job's folder, as that is seen from here."""


class SnapshotReader:
    """A finished snapshot, checked against the job that it is for. step, epoch: after and in which it was taken."""

    def __init__(self, path: Path, spec: JobSpec) -> None:
        """Raises SnapshotMissing, CheckpointError if the file is truncated, or of another job's tensors or optimizer,
        OSError if it cannot be read from here, whatever is in it.
        """
        self.path = path
        self._places = _Places(spec)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise  # other folders are here than where it was written
            raise SnapshotMissing(f"{path}: {error.strerror}; use another snapshot") from error
        try:
            header = read_header(self._descriptor, path)
            self.step, self.epoch = _check(path, header, self._places.tensors)
            self._entries = [header.entries[name] for name, _, _ in self._places.tensors]
        except BaseException:
            self.close()
            raise

    def read_block(self, block: Block, part: str, into: torch.Tensor) -> None:
        """Fills the block's fp32 elements, all but the gaps between tensors, which it leaves as they are. Raises
        CheckpointError, OSError.
        """
        if into.dtype != torch.float32 or into.shape != (block.elements,):
            raise ValueError(
                f"a block of {block.elements} elements cannot be read into {into.dtype} {tuple(into.shape)}"
            )
        view = into.numpy().data.cast("B")
        size = into.element_size()
        for piece in block.pieces:
            entry = self._entries[self._places.of(part, piece.tensor)]
            self._read(
                entry.offset + piece.start * size, view[piece.offset * size : (piece.offset + piece.count) * size]
            )

    def read_updates(self, block: Block) -> int:
        """How many updates it has seen; 0 where the optimizer has no memory. Those of its first tensor."""
        if not self._places.has_steps:
            return 0
        data = bytearray(8)
        self._read(self._entries[self._places.of_step(block.pieces[0].tensor)].offset, memoryview(data))
        return int.from_bytes(data, "little")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, offset: int, into: memoryview) -> None:
        while into:
            count = os.preadv(self._descriptor, [into], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: was cut while it was read; use another snapshot")
            into, offset = into[count:], offset + count


def _check(path: Path, header: Header, tensors: list[Tensor]) -> tuple[int, int]:
    """The snapshot's step and epoch, if it holds exactly these tensors."""
    kind, version = header.metadata.get("kind"), header.metadata.get("format")
    if (kind, version) != (KIND, FORMAT):
        raise CheckpointError(f"{path}: is no snapshot of format {FORMAT} ({kind}, {version}); use another file")
    expected = make_header(tensors, {}).entries
    for name in sorted(expected.keys() | header.entries.keys()):
        if (wanted := _described(expected.get(name))) != (there := _described(header.entries.get(name))):
            raise CheckpointError(
                f"{path}: does not fit the job: {name} is {there} in the file and {wanted} in the job; "
                "go on with the model and the optimizer that it was taken of, or use another snapshot"
            )
    try:
        return int(header.metadata["step"]), int(header.metadata["epoch"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: does not say at which step it was taken; use another snapshot") from error


def _described(entry: Entry | None) -> str:
    return "missing" if entry is None else f"{entry.code} {list(entry.shape)} ({entry.nbytes} bytes)"
