"""The KV cache of one model: typed views of the flat range that the device pool maps frame by frame.

A block holds all layers of 16 tokens: for each layer its keys, [token][head][dimension], then its values. So one
gather of whole rows gives keys and values of a batch, token after token, and a block that moves is one contiguous copy.
Only blocks below the mapped frames may be touched; the views themselves read nothing.

Where keys and values differ in size, a row is what divides both, and a token takes several rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from computron.execution.blocks import BLOCK_TOKENS
from computron.models import CacheGeometry

Indices = npt.NDArray[np.int64]


class KVCache:
    """`memory`: flat uint8, the whole virtual range."""

    def __init__(self, geometry: CacheGeometry, memory: torch.Tensor) -> None:
        self.dtype = geometry.dtype
        self.device = memory.device
        self._heads = geometry.key_value_heads
        self._dims = (geometry.key_dim, geometry.value_dim)
        unit = math.gcd(*self._dims)
        self._row = self._heads * unit  # elements
        self._units = (geometry.key_dim // unit, geometry.value_dim // unit)
        layer_units = sum(self._units)
        self._block_units = geometry.layers * layer_units
        self.block_bytes = self._block_units * BLOCK_TOKENS * self._row * geometry.dtype.itemsize
        self.capacity = memory.numel() // self.block_bytes
        data = memory[: self.capacity * self.block_bytes].view(geometry.dtype)
        self._blocks = data.view(self.capacity, -1)
        # Views that start at a layer's own rows let all layers share one index.
        layer_starts = [layer * layer_units for layer in range(geometry.layers)]
        rows = data.view(-1, BLOCK_TOKENS * self._row)
        self._rows = [rows[start:] for start in layer_starts]
        tokens = data.view(-1, self._row)
        self._keys = [tokens[start * BLOCK_TOKENS :] for start in layer_starts]
        self._values = [tokens[(start + self._units[0]) * BLOCK_TOKENS :] for start in layer_starts]

    def slots(self, blocks: Indices, offsets: Indices) -> tuple[Indices, Indices]:
        """For `write`: where the keys and the values of tokens stand, given each token's block and place in it."""
        starts = blocks * (self._block_units * BLOCK_TOKENS)
        keys, values = (((starts + offsets * units)[:, None] + np.arange(units)).ravel() for units in self._units)
        return keys, values

    def rows(self, table: Indices) -> Indices:
        """For `read`: where the keys, and then the values, of `table`, [batch, blocks], stand."""
        starts = table.reshape(-1, 1) * self._block_units
        keys, values = self._units
        both = (starts + np.arange(keys)).ravel(), (starts + np.arange(keys, keys + values)).ravel()
        return np.concatenate(both)

    def write(
        self, layer: int, slots: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store `keys` and `values`, [1, heads, tokens, dim]."""
        self._keys[layer].index_copy_(0, slots[0], keys.transpose(1, 2).reshape(-1, self._row))
        self._values[layer].index_copy_(0, slots[1], values.transpose(1, 2).reshape(-1, self._row))

    def read(self, layer: int, rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [batch, heads, tokens, dim], tokens filling up whole blocks."""
        gathered = self._rows[layer].index_select(0, rows)
        keys = len(gathered) // sum(self._units) * self._units[0]
        return self._heads_first(gathered[:keys], batch, 0), self._heads_first(gathered[keys:], batch, 1)

    def _heads_first(self, rows: torch.Tensor, batch: int, kind: int) -> torch.Tensor:
        return rows.view(batch, -1, self._heads, self._dims[kind]).transpose(1, 2)

    def clear(self, blocks: Indices) -> None:
        """Zero these blocks. What stood in them may be a NaN as a number, which no mask hides."""
        (numbers,) = upload([blocks], self.device)
        self._blocks.index_fill_(0, numbers, 0)

    def move(self, moves: Mapping[int, int]) -> None:
        """Copy whole blocks, old -> new number; no new number is an old one. Done when this returns."""
        old, new = upload([np.fromiter(moves.keys(), np.int64), np.fromiter(moves.values(), np.int64)], self.device)
        self._blocks.index_copy_(0, new, self._blocks.index_select(0, old))
        if self.device.type == "cuda":  # the frames of the old blocks are unmapped next
            torch.cuda.current_stream(self.device).synchronize()


def upload(arrays: Sequence[Indices], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, by one copy: each copy may have to queue behind those of a swap."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device, non_blocking=True)
    pieces = torch.split(flat, [array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
