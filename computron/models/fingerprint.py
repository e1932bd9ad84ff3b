"""What a model is, as a short text that every node of a group can make of its own source, to compare it with others'.

A fingerprint sees the resolved config, the generation defaults, how embeddings are made, the files of tokenizer and
image processor, and of the weights each tensor's name, dtype and shape and some of its bytes: the first, middle and
last 4 KiB, or all of a tensor that is no larger than these. It does not see

- a change between the sampled bytes of a tensor, or in a tensor that is not sampled where a checkpoint has more than
  1024 of them (which ones are is chosen by their names);
- what the factory of a custom model reads, beyond its name, its arguments, and the file that defines it;
- remote code outside the checkpoint's folder.

Where the folder is, what its weight files are called and how tensors are spread over them does not matter.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from computron.config import ModelConfig
from computron.errors import CheckpointError
from computron.models.checkpoint import Source
from computron.models.custom import import_object
from computron.models.embedding import EmbeddingSettings
from computron.models.safetensors_file import FETCH_AGAIN, FileTensor
from computron.models.text import GenerationDefaults, configured_template

SAMPLE = 4 << 10  # bytes
MAX_SAMPLED = 1024  # tensors
DIGEST = 16  # bytes
# Beside weights and config.json: what tokenizers, chat templates and image processors are read from.
PARTS = ("*token*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "*.jinja", "chat_template*",
         "*processor_config.json")  # fmt: skip
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def checkpoint_fingerprint(
    model: ModelConfig,
    source: Source,
    tensors: Mapping[str, FileTensor],
    generation: GenerationDefaults,
    embedding: EmbeddingSettings | None,
) -> str:
    """Of a transformers model, in hex; the same for every part of it. `tensors`: of its files, none if it is random.

    Reads little, from places that are announced to the disk. Raises CheckpointError if a file cannot be read.
    """
    weights: Any = model.seed if source.random else _tensors(tensors)
    return _digest(
        [
            _stripped(source.config.to_dict()),
            dataclasses.asdict(generation),
            None if embedding is None else dataclasses.asdict(embedding),
            configured_template(model),
            _files(source, model.trust_remote_code),
            weights,
        ]
    )


def custom_fingerprint(model: ModelConfig) -> str:
    """Of a custom model, in hex. Tensors do not count: each part has its own.

    Raises ConfigError if there is no such factory or batch manager.
    """
    paths = {"factory": model.factory, "batch_manager": model.batch_manager}
    code = [path and _code(path, f'model "{model.id}": {setting}') for setting, path in paths.items()]
    return _digest([code, model.arguments, model.seed, model.dtype])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).hexdigest()


def _plain(value: Any) -> Any:
    """What stands for a value that JSON does not know; nothing that differs from process to process."""
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, datetime.date | datetime.time | torch.dtype) else type(value).__qualname__


def _stripped(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {str(key): _stripped(value) for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    return [_stripped(value) for value in config] if isinstance(config, list | tuple) else config


def _files(source: Source, code: bool) -> dict[str, str]:
    """Digests by name."""
    if source.folder is None:
        return {}
    patterns = (*PARTS, "*.py") if code else PARTS
    files = {file.name: file for pattern in patterns for file in source.folder.glob(pattern) if file.is_file()}
    return {name: _file(file) for name, file in files.items()}


def _file(file: Path) -> str:
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=DIGEST).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; {FETCH_AGAIN}") from error


def _code(path: str, where: str) -> list[str | None]:
    """The name in "package.module:name" and what the file holds that defines it, if it is one in Python.

    Where the module lies is left out. Raises ConfigError if there is no such thing.
    """
    defined = inspect.unwrap(import_object(path, where))
    try:
        file = inspect.getsourcefile(defined)
    except TypeError:  # not written in Python
        file = None
    return [path.rpartition(":")[2], _file(Path(file)) if file is not None and Path(file).is_file() else None]


def _tensors(tensors: Mapping[str, FileTensor]) -> list[Any]:
    samples = _samples(_sampled(tensors))
    return [(name, str(tensor.dtype), tensor.shape, samples.get(name)) for name, tensor in sorted(tensors.items())]


def _sampled(tensors: Mapping[str, FileTensor]) -> list[FileTensor]:
    """In the order of their bytes on disk."""
    chosen = list(tensors.values())
    if len(chosen) > MAX_SAMPLED:
        chosen.sort(key=lambda tensor: hashlib.blake2b(tensor.name.encode(), digest_size=8).digest())
    return sorted(chosen[:MAX_SAMPLED], key=lambda tensor: (tensor.path, tensor.offset))


def _samples(tensors: Sequence[FileTensor]) -> dict[str, str]:
    """Digests by name."""
    by_file: dict[Path, list[FileTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.path, []).append(tensor)
    digests = {}
    for path, held in by_file.items():
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; {FETCH_AGAIN}") from error
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no more than what is asked for
            for tensor in held:
                for offset, nbytes in _places(tensor):
                    os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_WILLNEED)
            for tensor in held:
                digest = hashlib.blake2b(digest_size=DIGEST)
                for offset, nbytes in _places(tensor):
                    digest.update(_read(file, tensor, offset, nbytes))
                digests[tensor.name] = digest.hexdigest()
        finally:
            os.close(file)
    return digests


def _places(tensor: FileTensor) -> Iterator[tuple[int, int]]:
    """(offset in the file, bytes) of what is read."""
    if tensor.nbytes <= 3 * SAMPLE:
        yield tensor.offset, tensor.nbytes
        return
    for begin in (0, (tensor.nbytes - SAMPLE) // 2, tensor.nbytes - SAMPLE):
        yield tensor.offset + begin, SAMPLE


def _read(file: int, tensor: FileTensor, offset: int, nbytes: int) -> bytes:
    try:
        data = os.pread(file, nbytes, offset)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: {error.strerror} while reading tensor {tensor.name}") from error
    if len(data) < nbytes:
        raise CheckpointError(f"{tensor.path}: truncated inside tensor {tensor.name}; {FETCH_AGAIN}")
    return data
