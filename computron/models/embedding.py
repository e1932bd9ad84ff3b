"""How a checkpoint turns hidden states into one vector: what sentence-transformers' files say, or sensible defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from computron.config import ModelConfig
from computron.errors import CheckpointError

Pooling = Literal["mean", "cls", "last"]
_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """`max_length`: tokens that the checkpoint was made for, None if it does not say."""

    pooling: Pooling
    normalize: bool
    max_length: int | None = None


def embedding_settings(model: ModelConfig, folder: Path | None, module: nn.Module) -> EmbeddingSettings:
    """From modules.json and what it names; without it the last token for causal models and the mean for others.

    The model's configuration overrides both. Raises CheckpointError for a pooling that is not served.
    """
    pooling: Pooling = "last" if _is_causal(module) else "mean"
    normalize = True
    max_length = None
    if folder is not None and (folder / "modules.json").is_file():
        modules = _read(folder / "modules.json")
        kinds = [str(entry["type"]).rpartition(".")[2] for entry in modules]
        unknown = [kind for kind in kinds if kind not in _KNOWN_MODULES]
        if unknown:
            raise CheckpointError(
                f"{folder / 'modules.json'}: {', '.join(unknown)} on top of the transformer is not served; "
                'serve the model with task = "custom" and a factory of your own'
            )
        normalize = "Normalize" in kinds
        if "Pooling" in kinds and model.pooling == "auto":
            pooling = _pooling(folder / modules[kinds.index("Pooling")]["path"] / "config.json")
        settings = folder / "sentence_bert_config.json"
        if settings.is_file():
            max_length = _read(settings).get("max_seq_length")
    if model.pooling != "auto":
        pooling = model.pooling
    return EmbeddingSettings(pooling, normalize if model.normalize is None else model.normalize, max_length)


def _pooling(file: Path) -> Pooling:
    config: Mapping[str, Any] = _read(file)
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if isinstance(config.get("pooling_mode"), str):
        chosen.append(config["pooling_mode"])
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise CheckpointError(
            f"{file}: {' and '.join(chosen) or 'no'} pooling is not served; "
            'set pooling to "mean", "cls" or "last" in the model\'s configuration'
        )
    return _MODES[chosen[0]]


def _is_causal(module: nn.Module) -> bool:
    return any(getattr(part, "is_causal", False) is True for part in module.modules())


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); fetch the checkpoint again") from error
