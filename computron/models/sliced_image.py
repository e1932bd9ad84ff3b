"""The image of a part of a model: slices of another image's tensors, read without reading the rest of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from computron.models.images import LaidOutImage, Run, StateImage
from computron.models.layout import Layout, TensorSlot
from computron.models.tensor_parallel import Part

# Name in the part's layout -> name in the whole one, and what is taken of that tensor (None: all of it).
Sources = Mapping[str, tuple[str, Part | None]]


def slice_image(whole: LaidOutImage, layout: Layout, sources: Sources) -> LaidOutImage:
    """An image laid out as `layout`, with the bytes that `whole` has for `sources`."""
    if not isinstance(whole, StateImage):
        return SlicedImage(whole, layout, sources)

    def make() -> dict[str, torch.Tensor]:
        # Copies, so that the whole tensors are let go.
        state = whole.make()
        return {
            name: state[source].clone() if part is None else part.of(state[source])
            for name, (source, part) in sources.items()
        }

    return StateImage(layout, make)


class SlicedImage(LaidOutImage):
    """Reads of another image only the bytes that it needs; a slice of columns is many short runs."""

    def __init__(self, whole: LaidOutImage, layout: Layout, sources: Sources) -> None:
        super().__init__(layout)
        self._whole = whole
        slots = {slot.name: slot for slot in whole.layout.slots}
        self._sources = {name: (slots[source], part) for name, (source, part) in sources.items()}

    def read_tensor(self, slot: TensorSlot, start: int, buffer: memoryview) -> None:
        whole, part = self._sources[slot.name]
        if part is None:
            self._whole.read_tensor(whole, start, buffer)
        else:
            self._whole.read_runs(whole, list(_runs(whole, part, start, len(buffer))), buffer)

    def place(self, slot: TensorSlot) -> tuple[Path, int] | None:
        whole, part = self._sources[slot.name]
        place = self._whole.place(whole)
        if place is None or part is None:
            return place
        runs = list(_runs(whole, part, 0, slot.nbytes))
        return (place[0], place[1] + runs[0][0]) if len(runs) == 1 else None


def _runs(whole: TensorSlot, part: Part, start: int, nbytes: int) -> Iterator[Run]:
    """Where [start, start + nbytes) of the part's bytes stand in the whole tensor."""
    inner = math.prod(whole.shape[part.dim + 1 :]) * whole.dtype.itemsize
    row, own = whole.shape[part.dim] * inner, part.size * inner
    end = start + nbytes
    while start < end:
        outer, skip = divmod(start, own)
        for first, last in part.ranges:
            size = (last - first) * inner
            take = min(size - skip, end - start)
            if take > 0:
                yield outer * row + first * inner + skip, take
                start += take
            skip = max(skip - size, 0)
