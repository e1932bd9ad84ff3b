"""Classification of texts and images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from computron.errors import BadRequest
from computron.execution.batching import by_group, by_length, check_tokens, pad, padding_id
from computron.execution.requests import ClassifyJob, ClassOutput, Job
from computron.execution.single_pass import SinglePassExecutor
from computron.models import LoadedModel

Batch = Sequence[tuple[int, ClassifyJob]]


class ClassifyExecutor(SinglePassExecutor[ClassifyJob]):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        plan = model.plan
        self._takes_images = plan.takes_images
        self._activation = plan.activation
        self._padding = padding_id(model)
        # Models that classify by their last token find it by looking for padding: without a padding token they take
        # one text at a time.
        self._most_items = plan.config.max_batch_size if plan.takes_images or self._padding is not None else 1

    def _checked(self, job: Job) -> ClassifyJob:
        if not isinstance(job, ClassifyJob):
            raise BadRequest("this model classifies and does nothing else", param="model")
        if self._takes_images:
            if not isinstance(job.pixels, torch.Tensor) or job.pixels.dim() != 3:
                raise BadRequest("this model classifies images", param="input")
        elif job.tokens is None:
            raise BadRequest("this model classifies text", param="input")
        else:
            check_tokens(self._model, job.tokens, "input")
        return job

    def _batches(self, items: Batch) -> list[list[tuple[int, ClassifyJob]]]:
        if self._takes_images:
            return by_group(items, lambda item: tuple(item[1].pixels.shape), self._most_items)
        return by_length(
            items,
            lambda item: self._tokens(item[1]),
            most_items=self._most_items,
            most_tokens=self._model.plan.config.max_batch_tokens,
        )

    def _run(self, batch: Batch) -> list[ClassOutput]:
        logits = (self._image_logits if self._takes_images else self._text_logits)([job for _, job in batch]).float()
        probabilities = torch.sigmoid(logits) if self._activation == "sigmoid" else torch.softmax(logits, -1)
        return [ClassOutput(request, row) for (request, _), row in zip(batch, probabilities.tolist(), strict=True)]

    def _image_logits(self, jobs: Sequence[ClassifyJob]) -> torch.Tensor:
        pixels = torch.stack([job.pixels for job in jobs])
        moved = pixels.to(self._model.device, self._model.plan.dtype, non_blocking=True)
        logits: torch.Tensor = self._model.module(pixel_values=moved).logits
        return logits

    def _text_logits(self, jobs: Sequence[ClassifyJob]) -> torch.Tensor:
        texts = pad([job.tokens or () for job in jobs], self._padding or 0, self._model.device)
        logits: torch.Tensor = self._model.module(input_ids=texts.ids, attention_mask=texts.mask).logits
        return logits

    def _tokens(self, job: ClassifyJob) -> int:
        return len(job.tokens or ())
