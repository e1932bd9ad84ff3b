"""Classification of texts and images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from computron.errors import BadRequest
from computron.execution.batching import by_group, by_length, check_tokens, join_texts, pad, padding_id
from computron.execution.requests import ClassifyJob, ClassOutput, Job, Output
from computron.execution.single_pass import SinglePassExecutor, SinglePassRunner
from computron.execution.steps import ImageStep, RowsOutput, StepInput, StepOutput, TextBatch, TextStep
from computron.models import LoadedModel


class ClassifyExecutor(SinglePassExecutor[ClassifyJob, list[int]]):
    """A step's layout is the order of its requests."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        plan = model.plan
        self._takes_images = plan.takes_images
        # Models that classify by their last token find it by looking for padding: without a padding token they take
        # one text at a time.
        together = plan.takes_images or padding_id(model) is not None
        self._most_items = plan.config.max_batch_size if together else 1

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

    def _plan(self, items: Sequence[tuple[int, ClassifyJob]]) -> tuple[TextStep | ImageStep, list[int]]:
        if self._takes_images:
            batches = by_group(items, lambda item: tuple(item[1].pixels.shape), self._most_items)
        else:
            most_tokens = self._model.plan.config.max_batch_tokens
            batches = by_length(
                items, lambda item: self._tokens(item[1]), most_items=self._most_items, most_tokens=most_tokens
            )
        order = [request for batch in batches for request, _ in batch]
        if self._takes_images:
            return ImageStep(tuple(torch.stack([job.pixels for _, job in batch]) for batch in batches)), order
        return TextStep(tuple(join_texts([job.tokens or () for _, job in batch]) for batch in batches)), order

    def _outputs(self, layout: list[int], output: StepOutput) -> list[Output]:
        assert isinstance(output, RowsOutput), "the output is another task's"
        return [ClassOutput(request, row) for request, row in zip(layout, output.rows.tolist(), strict=True)]

    def _tokens(self, job: ClassifyJob) -> int:
        return len(job.tokens or ())


class ClassifyRunner(SinglePassRunner):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self._padding = padding_id(model) or 0

    def _run(self, step: StepInput) -> RowsOutput | None:
        if isinstance(step, ImageStep):
            return self._rows_output([self._probabilities(self._of_images(batch)) for batch in step.batches])
        assert isinstance(step, TextStep), "what classifies runs no other steps"
        return self._rows_output([self._probabilities(self._of_texts(batch)) for batch in step.batches])

    def _of_images(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Logits, [images, labels]; None where they are not."""
        moved = pixels.to(self._model.device, self._model.plan.dtype, non_blocking=True)
        output = self._model.forward(pixel_values=moved)
        return None if output is None else output.logits

    def _of_texts(self, batch: TextBatch) -> torch.Tensor | None:
        texts = pad(batch, self._padding, self._model.device)
        output = self._model.forward(input_ids=texts.ids, attention_mask=texts.mask)
        return None if output is None else output.logits

    def _probabilities(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        if logits is None:
            return None
        activation = self._model.plan.activation
        return torch.sigmoid(logits.float()) if activation == "sigmoid" else torch.softmax(logits.float(), -1)
