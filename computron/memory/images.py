"""What memory knows of a model: a flat range of bytes that can be read piece by piece. Nothing of its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FileExtent:
    """`nbytes` of the image at `offset` stand in `path` at `file_offset`, byte for byte."""

    offset: int
    nbytes: int
    path: Path
    file_offset: int


class ImageSource(Protocol):
    """Where a parameter image comes from. Methods may be called from several threads at once."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole image."""

    @property
    def segment_ends(self) -> Sequence[int]:
        """End offset of each segment, ascending; the last one equals `nbytes`."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the image's bytes from `offset` on; bytes between tensors are zero.

        Raises CheckpointError, with the file and the tensor, if they cannot be read.
        """

    def extents(self, offset: int, nbytes: int) -> list[FileExtent] | None:
        """Where these bytes stand on disk, gaps being zeros; None if no file holds them byte for byte."""
