"""Embeddings: hidden states of the last layer, pooled over each text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from computron.errors import BadRequest
from computron.execution.batching import PaddedTexts, by_length, check_tokens, pad, padding_id
from computron.execution.requests import EmbeddingOutput, EmbedJob, Job
from computron.execution.single_pass import SinglePassExecutor
from computron.models import LoadedModel


class EmbedExecutor(SinglePassExecutor[EmbedJob]):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        settings = model.plan.embedding
        assert settings is not None, "a model that embeds knows how"
        self._settings = settings
        self._padding = padding_id(model) or 0

    def _checked(self, job: Job) -> EmbedJob:
        if not isinstance(job, EmbedJob):
            raise BadRequest("this model gives embeddings of text and nothing else", param="model")
        check_tokens(self._model, job.tokens, "input")
        return job

    def _batches(self, items: Sequence[tuple[int, EmbedJob]]) -> list[list[tuple[int, EmbedJob]]]:
        config = self._model.plan.config
        return by_length(
            items,
            lambda item: len(item[1].tokens),
            most_items=config.max_batch_size,
            most_tokens=config.max_batch_tokens,
        )

    def _run(self, batch: Sequence[tuple[int, EmbedJob]]) -> list[EmbeddingOutput]:
        texts = pad([job.tokens for _, job in batch], self._padding, self._model.device)
        hidden = self._model.module(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
        pooled = pool(hidden.float(), texts, self._settings.pooling)
        vectors = normalize(pooled, dim=-1) if self._settings.normalize else pooled
        return [EmbeddingOutput(request, vector) for (request, _), vector in zip(batch, vectors.tolist(), strict=True)]

    def _tokens(self, job: EmbedJob) -> int:
        return len(job.tokens)


def pool(hidden: torch.Tensor, texts: PaddedTexts, pooling: str) -> torch.Tensor:
    """[texts, tokens, width] -> [texts, width]: the mean over each text's tokens, its first or its last one."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), texts.lengths - 1]
    if texts.mask is None:
        return hidden.mean(1)
    return (hidden * texts.mask[:, :, None]).sum(1) / texts.lengths[:, None]
