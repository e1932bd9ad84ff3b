"""From a model's `source` to a folder on disk, its configuration and its tensors. Reads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from computron.config import ModelConfig
from computron.errors import CheckpointError, ConfigError
from computron.models import presets
from computron.models.safetensors_file import FileTensor, read_header

RANDOM = "random:"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a served model reads; weights in other formats stay where they are.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
HUB_DUPLICATES = ["original/*", "consolidated*", "onnx/*", "openvino/*"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Source:
    """`folder`: where configs and tokenizer are, None for a preset. `random`: weights are made, not read."""

    config: PretrainedConfig
    folder: Path | None
    random: bool


@contextmanager
def naming(model_id: str) -> Iterator[None]:
    """A CheckpointError that is raised inside begins with the model's id, by which its line is found."""
    try:
        yield
    except CheckpointError as error:
        if error.message.startswith('model "'):
            raise
        raise CheckpointError(f'model "{model_id}": {error.message}') from error


def open_source(model: ModelConfig) -> Source:
    """Find the checkpoint of `model.source`; fetch it if it is a hub id that is not cached.

    Raises ConfigError for a source that cannot be meant, CheckpointError for one that is missing or broken.
    """
    if not model.source:
        raise ConfigError(f'model "{model.id}": source is missing; give a checkpoint folder, a hub id or "random:…"')
    name = model.source.removeprefix(RANDOM)
    random = name != model.source
    if random and name in presets.PRESETS:
        return Source(presets.preset_config(name), None, random=True)
    path = Path(name).expanduser()
    if path.is_file() and random:
        return Source(_read_config(path, model), path.parent, random=True)
    if path.is_dir():
        folder = path
    elif random:
        raise ConfigError(
            f'model "{model.id}": source "{model.source}" is neither a folder, nor a config.json, nor one of the '
            f"presets {', '.join(presets.PRESETS)}"
        )
    elif name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        folder = _fetch(model)
    else:
        raise CheckpointError(f'model "{model.id}": source: there is no folder {path.absolute()}')
    return Source(_read_config(folder, model), folder, random)


def checkpoint_tensors(folder: Path) -> dict[str, FileTensor]:
    """Every tensor of a checkpoint folder, from `model.safetensors` or the shards of its index."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not index.is_file():
        others = sorted(p.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"it has {', '.join(others[:3])}; " if others else ""
        raise CheckpointError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there; {found}"
            "save the checkpoint with safetensors (model.save_pretrained does)"
        )
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: corrupt index ({error!r}); fetch the checkpoint again") from error
    tensors: dict[str, FileTensor] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: it names {shard}, which is missing; fetch the checkpoint again")
        tensors |= read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing; fetch the checkpoint again")
    return tensors


def choose_dtype(model: ModelConfig, config: PretrainedConfig, tensors: Mapping[str, FileTensor]) -> torch.dtype:
    """The configured dtype; for "auto" the checkpoint's, as its config or else its first floating tensor says."""
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point)
    return next(floats, torch.float32)


def in_words(error: BaseException) -> str:
    """What a library says of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_config(path: Path, model: ModelConfig) -> PretrainedConfig:
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a checkpoint folder as transformers writes it is needed")
    try:
        config: Any = AutoConfig.from_pretrained(str(path), trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: transformers cannot read it: {in_words(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{file}: the checkpoint is quantized, which is not supported; "
            "use the unquantized one, or dequantize it and save it again"
        )
    result: PretrainedConfig = config
    return result


def _fetch(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f'model "{model.id}": source "{model.source}"'
    try:
        return Path(
            snapshot_download(
                model.source, revision=model.revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_DUPLICATES
            )
        )
    except HFValidationError as error:
        raise ConfigError(f"{where} is neither a folder nor a hub id") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{where} is gated; accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{where} has no revision {model.revision or 'main'} on the hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where} is neither a folder nor a model on the hub; if it is a private one, log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        said = re.sub(r"^\[Errno -?\d+\] ", "", in_words(error.__cause__ or error)).rstrip(".")
        why = f"the hub cannot be reached ({said})" if isinstance(error, LocalEntryNotFoundError) else said
        raise CheckpointError(
            f"{where} is no folder, and taken as a hub id it could not be fetched: {why}; "
            "give the path of a checkpoint folder, or fetch it where there is a network"
        ) from error
