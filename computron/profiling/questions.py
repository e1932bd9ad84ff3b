"""What is asked of a model, so large as it is wanted, in the form that its task has."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec
from PIL import Image

TOKENS = range(10, 90)  # ids that every vocabulary has
IMAGE_SIZE = 64


@dataclass(frozen=True, slots=True)
class Question:
    path: str
    body: bytes


def texts(model: str, task: str, *, count: int, tokens: int, output_tokens: int = 1, stream: bool = False) -> Question:
    """`count` texts of so many tokens each, for a model that generates (so many more), embeds or classifies texts."""
    prompts = [[TOKENS[(place + 7 * number) % len(TOKENS)] for place in range(tokens)] for number in range(count)]
    if task == "embed":
        return _question("/v1/embeddings", {"model": model, "input": prompts, "encoding_format": "base64"})
    if task == "classify":
        return _question("/v1/classify", {"model": model, "input": prompts, "top_k": 1})
    length = {"max_tokens": output_tokens, "ignore_eos": True}
    return _question(
        "/v1/completions", {"model": model, "prompt": prompts, "temperature": 0.0, "stream": stream, **length}
    )


def images(model: str, *, count: int) -> Question:
    """For a model that classifies images."""
    file = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (90, 120, 150)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    return _question("/v1/classify", {"model": model, "image": [image] * count})


def custom(model: str, body: Any) -> Question:
    """For a custom model: whatever its batch manager parses."""
    return _question(f"/v1/models/{quote(model)}/infer", body)


def _question(path: str, body: Mapping[str, Any]) -> Question:
    return Question(path, msgspec.json.encode(body))
