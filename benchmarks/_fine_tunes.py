"""Fine-tunes of the demonstration's models that share no page: the model, with noise on every tensor."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from computron.models.demo import cache_folder

if TYPE_CHECKING:
    import torch

NOISE = 0.02  # of each tensor's standard deviation: every page changes, the model still speaks


def fine_tunes(base: Path, count: int) -> dict[str, Path]:
    """Checkpoint folders by name, made once and kept in the cache, each as large as `base`."""
    root = cache_folder() / "fine-tunes"
    return {
        f"{base.name}-{seed}": _ensure(base, root / f"{base.name}-{seed}-noise-{NOISE:g}", seed)
        for seed in range(count)
    }


def _ensure(base: Path, folder: Path, seed: int) -> Path:
    from safetensors.torch import load_file, save_file

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        shutil.copytree(base, made, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = load_file(base / "model.safetensors")
        changed = {name: noisy(tensor, seed) for name, tensor in tensors.items()}
        save_file(changed, made / "model.safetensors", metadata={"format": "pt"})
        os.rename(made, folder)
    return folder


def noisy(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """What is not of floating point stays as it is."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    values = tensor.float()
    return (values + NOISE * values.std() * noise).to(tensor.dtype)
