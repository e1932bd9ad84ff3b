"""What text models need besides weights: the tokenizer, the chat template, where answers end, sampling defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from computron.config import ModelConfig
from computron.errors import BadRequest, CheckpointError
from computron.models.byte_tokenizer import byte_tokenizer
from computron.models.checkpoint import RANDOM, in_words


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint's generation config says, for requests that do not say otherwise.

    `eos`: ids that end an answer. None: the checkpoint has no opinion.
    """

    eos: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None


def generation_defaults(folder: Path | None, config: PretrainedConfig) -> GenerationDefaults:
    """From generation_config.json, or the ends of the model's config without one. Raises CheckpointError."""
    file = folder / "generation_config.json" if folder is not None else None
    values: Mapping[str, Any] = {}
    if file is not None and file.is_file():
        try:
            values = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: not a JSON object ({error}); fetch the checkpoint again") from error
    eos = values.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    return GenerationDefaults(
        eos=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
        temperature=values.get("temperature"),
        top_p=values.get("top_p"),
        top_k=values.get("top_k"),
        min_p=values.get("min_p"),
        repetition_penalty=values.get("repetition_penalty"),
        max_tokens=values.get("max_new_tokens"),
    )


def load_tokenizer(model: ModelConfig, folder: Path | None, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; a random model without one gets a tokenizer of bytes.

    Raises CheckpointError if a checkpoint has none that transformers can read.
    """
    tokenizer: PreTrainedTokenizerBase
    if folder is None or (model.source.startswith(RANDOM) and not (folder / "tokenizer_config.json").is_file()):
        tokenizer = byte_tokenizer(config.get_text_config().vocab_size)
    else:
        tokenizer = _read_tokenizer(model, folder)
    template = configured_template(model)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _read_tokenizer(model: ModelConfig, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load a tokenizer from it ({in_words(error)}); "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    return tokenizer


def render_chat(
    tokenizer: PreTrainedTokenizerBase, model_id: str, messages: Sequence[Mapping[str, Any]], **arguments: Any
) -> str:
    """The messages as one prompt, special tokens included. `arguments`: for the template (tools, documents, …).

    Raises BadRequest if the model has no chat template, or its template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise BadRequest(
            f'model "{model_id}" has no chat template; use /v1/completions, or set chat_template in its configuration',
            param="messages",
        )
    arguments.setdefault("add_generation_prompt", not arguments.get("continue_final_message", False))
    try:
        rendered = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **arguments)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise BadRequest(
            f"the model's chat template refuses these messages: {in_words(error)}", param="messages"
        ) from error
    return str(rendered)


def configured_template(model: ModelConfig) -> str | None:
    """The chat template that is to replace the checkpoint's. Raises CheckpointError if its file does not exist."""
    text = model.chat_template
    if text is None:
        return None
    path = Path(text).expanduser()
    if "{" not in text:
        if not path.is_file():
            raise CheckpointError(f'model "{model.id}": chat_template is neither a template nor a file: {text}')
        return path.read_text(encoding="utf-8")
    return text
