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


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the host store.

    `pages`: one content id for each page, in image order; equal ids are one content. `page_sizes`: bytes used of each
    page, all but the last one full. `segments`: number of pages of each segment; a page that two segments touch
    belongs to the first.
    """

    id: str
    nbytes: int
    page_bytes: int
    pages: tuple[int, ...]
    page_sizes: tuple[int, ...]
    segments: tuple[int, ...]


def pages_of_segments(segment_ends: Sequence[int], page_bytes: int) -> tuple[int, ...]:
    """Number of pages of each segment, where a page that two segments touch belongs to the first."""
    ends = [-(-end // page_bytes) for end in segment_ends]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
