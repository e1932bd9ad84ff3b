"""Embeddings: hidden states of the last layer, pooled over each text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from computron.errors import BadRequest
from computron.execution.batching import PaddedTexts, by_length, check_tokens, join_texts, pad, padding_id
from computron.execution.requests import EmbeddingOutput, EmbedJob, Job, Output
from computron.execution.single_pass import SinglePassExecutor, SinglePassRunner
from computron.execution.steps import RowsOutput, StepInput, StepOutput, TextBatch, TextStep
from computron.models import LoadedModel


class EmbedExecutor(SinglePassExecutor[EmbedJob, list[int]]):
    """A step's layout is the order of its requests."""

    def _checked(self, job: Job) -> EmbedJob:
        if not isinstance(job, EmbedJob):
            raise BadRequest("this model gives embeddings of text and nothing else", param="model")
        check_tokens(self._model, job.tokens, "input")
        return job

    def _plan(self, items: Sequence[tuple[int, EmbedJob]]) -> tuple[TextStep, list[int]]:
        config = self._model.plan.config
        batches = by_length(
            items,
            lambda item: len(item[1].tokens),
            most_items=config.max_batch_size,
            most_tokens=config.max_batch_tokens,
        )
        step = TextStep(tuple(join_texts([job.tokens for _, job in batch]) for batch in batches))
        return step, [request for batch in batches for request, _ in batch]

    def _outputs(self, layout: list[int], output: StepOutput) -> list[Output]:
        assert isinstance(output, RowsOutput), "the output is another task's"
        rows = zip(layout, output.rows.tolist(), strict=True)
        return [EmbeddingOutput(request, vector) for request, vector in rows]

    def _tokens(self, job: EmbedJob) -> int:
        return len(job.tokens)


class EmbedRunner(SinglePassRunner):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        settings = model.plan.embedding
        assert settings is not None, "a model that embeds knows how"
        self._settings = settings
        self._padding = padding_id(model) or 0

    def _run(self, step: StepInput) -> RowsOutput | None:
        assert isinstance(step, TextStep), "what embeds runs no other steps"
        return self._rows_output([self._vectors(batch) for batch in step.batches])

    def _vectors(self, batch: TextBatch) -> torch.Tensor | None:
        texts = pad(batch, self._padding, self._model.device)
        output = self._model.forward(input_ids=texts.ids, attention_mask=texts.mask)
        if output is None:
            return None
        pooled = pool(output.last_hidden_state.float(), texts, self._settings.pooling)
        return normalize(pooled, dim=-1) if self._settings.normalize else pooled


def pool(hidden: torch.Tensor, texts: PaddedTexts, pooling: str) -> torch.Tensor:
    """[texts, tokens, width] -> [texts, width]: the mean over each text's tokens, its first or its last one."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), texts.lengths - 1]
    if texts.mask is None:
        return hidden.mean(1)
    return (hidden * texts.mask[:, :, None]).sum(1) / texts.lengths[:, None]
