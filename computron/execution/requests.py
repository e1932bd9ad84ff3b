"""The nouns that travel between `api`, `node` and `execution`: what is asked, what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch the filters off.

    `logprobs`: number of alternatives to report for each token; None reports nothing, 0 the chosen token alone.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # keep the stop string in the text
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """One sequence to continue. `prompt`: token ids, at least one."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """One text to embed, as token ids with its special tokens."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClassifyJob:
    """One text (token ids) or one image (`pixels`: the processor's tensor, C x H x W) to classify."""

    tokens: tuple[int, ...] | None = None
    pixels: Any = None


@dataclass(frozen=True, slots=True)
class CustomJob:
    """One request of a custom model: what its batch manager's `parse` made of the JSON body."""

    payload: Any


Job = GenerateJob | EmbedJob | ClassifyJob | CustomJob


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of `token` and of the likeliest alternatives, (token id, text, log probability), best first."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextOutput:
    """What one step added to one sequence. `text` may be empty while a character or a stop string is incomplete.

    `prompt_logprobs` comes with the first output of a request that asked for it; its first entry is None.
    """

    request: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    request: int
    embedding: Sequence[float]


@dataclass(frozen=True, slots=True)
class ClassOutput:
    """`probabilities`: one for each label, in the label order of the model."""

    request: int
    probabilities: Sequence[float]


@dataclass(frozen=True, slots=True)
class CustomOutput:
    """`value`: what the batch manager's `split` gave for this request; it can be encoded as JSON."""

    request: int
    value: Any


@dataclass(frozen=True, slots=True)
class FailedOutput:
    """This request alone failed, not its batch. `refused`: since it cannot be served as it is."""

    request: int
    message: str
    refused: bool = False


Output = TextOutput | EmbeddingOutput | ClassOutput | CustomOutput | FailedOutput


@dataclass(slots=True)
class StepResult:
    """What one step of one model gave.

    `finished`: requests that are done (failed ones too). `cache_blocks`: for every other request of the model that is
    admitted, the KV blocks that it will hold after its next step.
    """

    outputs: list[Output]
    finished: tuple[int, ...]
    cache_blocks: dict[int, int] = field(default_factory=dict)
    batch_size: int = 0
    tokens: int = 0  # tokens computed, prompt and new ones
