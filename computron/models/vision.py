"""From the bytes of an image file to the tensor that a model takes, by the checkpoint's own image processor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from PIL import Image, UnidentifiedImageError

from computron.config import ModelConfig
from computron.errors import BadRequest, CheckpointError
from computron.models.checkpoint import in_words

MAX_PIXELS = 64 << 20  # more is refused before it is decoded


class ImageProcessor:
    """`checkpoint`: a transformers image processor that works without torchvision."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint

    def __call__(self, data: bytes) -> torch.Tensor:
        """Pixels, C x H x W in float32, of a JPEG, PNG or any other file that Pillow reads.

        Raises BadRequest if it is none or too large.
        """
        image = open_image(data)
        pixels: torch.Tensor = self._checkpoint(images=[image], return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)


def load_image_processor(model: ModelConfig, folder: Path | None) -> ImageProcessor:
    """Raises CheckpointError if the checkpoint has no image processor that transformers can build."""
    file = None if folder is None else folder / "preprocessor_config.json"
    if file is None or not file.is_file():
        raise CheckpointError(
            f'model "{model.id}": {folder} has no preprocessor_config.json, so it is unknown how images are prepared; '
            "copy it from the model's original checkpoint"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
        # Asked for by name, because the Auto class of some versions wants torchvision for any of them.
        name = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor") + "Pil"
        chosen: Any = getattr(transformers, name, None)
        if chosen is not None:
            return ImageProcessor(chosen.from_pretrained(str(folder)))
        load = cast(Any, transformers.AutoImageProcessor).from_pretrained
        return ImageProcessor(load(str(folder), backend="pil", trust_remote_code=model.trust_remote_code))
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise CheckpointError(f"{file}: transformers cannot use it: {in_words(error)}") from error


def open_image(data: bytes) -> Image.Image:
    """The image in RGB. Raises BadRequest if the bytes are no image, or one of more than 64 million pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRequest(f"the image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequest(f"the input is not an image that can be read: {error}") from error
