"""Tensors as the bytes that a file holds."""

from __future__ import annotations

import torch


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """A contiguous CPU tensor, cast with torch's rounding (to nearest, ties to even); no copy if it has the dtype."""
    return values.to(dtype).reshape(-1).view(torch.uint8).numpy().data
