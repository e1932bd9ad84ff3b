"""EfficientNet-lite0, a plain torch module, as an ImageNet classifier of base64 images. From the repository's root:

    source .venv/bin/activate
    python -m computron.models.demo                 # fetches the weights, once
    computron serve examples/efficientnet.toml
    echo "{\\"image\\": \\"$(base64 -w0 cat.jpg)\\", \\"top\\": 3}" |
        curl -s localhost:8000/v1/models/efficientnet-lite0/infer -H 'Content-Type: application/json' -d @-

The answer is {"classes": [{"index", "label", "probability"}, …]}, the likeliest first.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from computron.errors import BadRequest
from computron.models.demo import cache_folder
from computron.models.vision import open_image

# As the weights were trained.
RESIZE, CROP = 256, 224
MEAN, DEVIATION = 0.498, 0.502


def make(folder: str | None = None) -> nn.Module:
    """The module with its weights. `folder`: where the demonstration put it, by default in its cache."""
    path = cache_folder() / "demo" / "efficientnet-lite0" if folder is None else Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing; run `python -m computron.models.demo` to fetch it")
    module: nn.Module = _import_package(path / "efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(load_file(path / "model.safetensors"))
    module.labels = json.loads((path / "labels.json").read_text(encoding="utf-8"))
    return module


@dataclass(frozen=True, slots=True)
class Picture:
    pixels: torch.Tensor
    top: int


class ImageBatches:
    def __init__(self, module: Any) -> None:
        self._labels: Sequence[str] = module.labels
        self._dtype: torch.dtype = next(module.parameters()).dtype

    def parse(self, body: Any) -> Picture:
        if not isinstance(body, Mapping) or not isinstance(body.get("image"), str):
            raise BadRequest('the body must be a JSON object with "image", a file in base64', param="image")
        top = body.get("top", 5)
        if type(top) is not int or not 1 <= top <= len(self._labels):
            raise BadRequest(f"top must be a whole number from 1 to {len(self._labels)}", param="top")
        try:
            data = base64.b64decode(body["image"].rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadRequest(f"image is not base64: {error}", param="image") from error
        return Picture(prepare(open_image(data)).to(self._dtype), top)

    def group(self, payload: Picture) -> Hashable:
        return None

    def make_batch(self, payloads: Sequence[Picture]) -> tuple[Any, ...]:
        self._tops = [payload.top for payload in payloads]
        return (torch.stack([payload.pixels for payload in payloads]),)

    def split_batch(self, output: torch.Tensor, count: int) -> Sequence[Any]:
        probabilities = output.float().softmax(dim=1).cpu()
        return [self._answer(row, top) for row, top in zip(probabilities, self._tops, strict=True)]

    def _answer(self, probabilities: torch.Tensor, top: int) -> dict[str, Any]:
        values, indices = probabilities.topk(top)
        return {
            "classes": [
                {"index": index, "label": self._labels[index], "probability": value}
                for value, index in zip(values.tolist(), indices.tolist(), strict=True)
            ]
        }


def prepare(image: Image.Image) -> torch.Tensor:
    """Pixels (3 x 224 x 224, float32): the shorter side resized, the middle cut out, normalised."""
    scale = RESIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, upper = (image.width - CROP) // 2, (image.height - CROP) // 2
    image = image.crop((left, upper, left + CROP, upper + CROP))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
    return (pixels.permute(2, 0, 1) - MEAN) / DEVIATION


def _import_package(folder: Path) -> Any:
    """Import a package from where it lies, without installing it."""
    name = folder.name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
