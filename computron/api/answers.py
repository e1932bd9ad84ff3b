"""Bodies that clients get: OpenAI's shapes. Fields that are UNSET are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType


class Timings(Struct, kw_only=True):
    """Where a request's time went, in seconds from its arrival; the largest where one call made several requests."""

    queue_seconds: float | None
    swap_seconds: float
    swap_bytes: int
    first_output_seconds: float | None
    total_seconds: float | None


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | UnsetType = UNSET


class CompletionLogprobs(Struct, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct, kw_only=True):
    """`rank`: 1 for the likeliest token; None where it is not known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """Also a chunk of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    computron: Timings | UnsetType = UNSET


class TopLogprob(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str
    refusal: str | None = None


class ChatChoice(Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    computron: Timings | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class Embedding(Struct, kw_only=True):
    index: int
    object: str = "embedding"
    embedding: list[float] | str


class EmbeddingList(Struct, kw_only=True):
    object: str = "list"
    model: str
    data: list[Embedding]
    usage: Usage
    computron: Timings | UnsetType = UNSET


class LabelProbability(Struct, kw_only=True):
    label: str
    probability: float


class Classification(Struct, kw_only=True):
    """`top`: the likeliest labels, best first. `probs`: of every label, in the model's order."""

    index: int
    label: str
    top: list[LabelProbability]
    probs: list[float]
    num_classes: int


class ClassificationList(Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage
    computron: Timings | UnsetType = UNSET


class Inference(Struct, kw_only=True):
    """`output`: what the model's batch manager gave."""

    id: str
    object: str = "inference"
    created: int
    model: str
    output: Any
    computron: Timings | UnsetType = UNSET


class Model(Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "computron"
    root: str
    parent: str | None = None
    max_model_len: int | None
    task: str
    state: str
    bytes: int
    pages: int
    segments: int
    cache_bytes_per_token: float
    overlaps: bool
    max_batch_size: int
    resident_ratio: float
    pinned: bool
    queue_depth: int
    running: int


class ModelList(Struct, kw_only=True):
    object: str = "list"
    data: list[Model]


class Tokens(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
