"""Weights made from names alone, for experiments: the same seed gives the same bytes, in any order of reading."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from computron.models.images import LaidOutImage, Run
from computron.models.layout import Layout, TensorSlot

CHUNK = 1 << 16  # elements with a generator of their own


class RandomImage(LaidOutImage):
    """Matrices are normal with the model's usual deviation, norms are ones, biases zeros."""

    def __init__(self, layout: Layout, *, seed: int, deviation: float = 0.02) -> None:
        super().__init__(layout)
        self._seed = seed
        self._deviation = deviation

    def read_tensor(self, slot: TensorSlot, start: int, buffer: memoryview) -> None:
        self.read_runs(slot, [(start, len(buffer))], buffer)

    def read_runs(self, slot: TensorSlot, runs: Sequence[Run], buffer: memoryview) -> None:
        size = slot.dtype.itemsize
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        done, made, bytes_of_made = 0, -1, torch.empty(0, dtype=torch.uint8)
        for start, nbytes in runs:
            end = start + nbytes
            while start < end:
                chunk, skip = divmod(start, CHUNK * size)
                if chunk != made:
                    made, bytes_of_made = chunk, self._chunk(slot, chunk).view(torch.uint8)
                values = bytes_of_made[skip : skip + end - start]
                target[done : done + len(values)] = values
                done += len(values)
                start += len(values)

    def _chunk(self, slot: TensorSlot, index: int) -> torch.Tensor:
        elements = slot.nbytes // slot.dtype.itemsize
        count = min(CHUNK, elements - index * CHUNK)
        last = slot.name.rpartition(".")[2]
        if not slot.dtype.is_floating_point or last in ("bias", "running_mean"):
            return torch.zeros(count, dtype=slot.dtype)
        if len(slot.shape) == 1 and last in ("weight", "running_var"):
            return torch.ones(count, dtype=slot.dtype)
        # 63 bits: what torch takes as a seed.
        digest = hashlib.blake2b(f"{self._seed}/{slot.name}/{index}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(count).normal_(0.0, self._deviation, generator=generator).to(slot.dtype)
