"""Continuous batching: a step computes one token of every sequence that decodes, and chunks of prompts beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from computron.errors import BadRequest, ContextTooLong, OutOfMemory
from computron.execution import sequence as sequences
from computron.execution.batching import check_vocabulary, execution_error
from computron.execution.blocks import BLOCK_TOKENS, BlockAllocator, blocks_for
from computron.execution.choosing import Choice, choose, wants_only_likeliest
from computron.execution.packed_batch import Work, cut, pack, packed
from computron.execution.positions import position_limit
from computron.execution.requests import FailedOutput, GenerateJob, Job, Output, StepResult, TextOutput
from computron.execution.sampling import UNUSABLE
from computron.execution.sequence import Running
from computron.execution.steps import GenerateStep, LogitsOutput, StepInput, StepOutput, TokensOutput
from computron.execution.token_text import TokenText
from computron.models import LoadedModel


@dataclass(frozen=True, slots=True)
class _Planned:
    """A step that is on its way. `works`: as they were packed, part after part. `taken`: blocks that it was given."""

    step: GenerateStep
    works: list[Work]
    taken: list[tuple[Running, list[int]]]
    batch_size: int


class GenerateExecutor:
    """Serves `GenerateJob`s over a paged cache, of which it knows which blocks are whose.

    `block_bytes`: of a block of the cache; `capacity`: blocks that can be addressed.
    """

    overlaps = False

    def __init__(self, model: LoadedModel, frame_bytes: int, block_bytes: int, capacity: int) -> None:
        plan = model.plan
        self._model = model
        self._allocator = BlockAllocator()
        self._frame_bytes = frame_bytes
        self._budget = max(plan.config.max_batch_tokens, plan.config.max_batch_size)
        # Logits of whole prompts, a vocabulary for each token, are kept few where they have to travel.
        self._scored = sequences.PROMPT_LOGPROBS_CHUNK if plan.shard.pipeline_parallel > 1 else self._budget
        assert isinstance(model.module, PreTrainedModel), "what generates is a transformers model"
        self._position_limit = position_limit(model.module.config)
        self.limit_cache(block_bytes, capacity)
        self._sequences: dict[int, Running] = {}
        self._started: set[int] = set()  # those that hold, or may come to hold, blocks
        self._text = TokenText(model)
        self._planned: _Planned | None = None

    def limit_cache(self, block_bytes: int, capacity: int) -> None:
        assert self._allocator.limit == 0, "the cache is in use"
        self._block_bytes = block_bytes
        self._capacity = capacity
        limits = (capacity * BLOCK_TOKENS, self._model.plan.max_model_len, self._position_limit)
        self._max_len = min(limit for limit in limits if limit)

    @property
    def blocks_per_frame(self) -> float:
        return self._frame_bytes / self._block_bytes

    @property
    def max_len(self) -> int:
        return self._max_len

    def prepare(self, job: Job) -> int:
        if not isinstance(job, GenerateJob):
            raise BadRequest("this model generates text and takes nothing else", param="model")
        if not job.prompt:
            raise BadRequest("the prompt is empty: it must have at least one token", param="prompt")
        sampling = job.sampling
        check_vocabulary(self._model, job.prompt, "prompt")
        check_vocabulary(self._model, sampling.logit_bias, "logit_bias")
        check_vocabulary(self._model, sampling.stop_token_ids, "stop_token_ids")
        length = len(job.prompt)
        if length + min(sampling.max_tokens, 1) > self._max_len:
            raise ContextTooLong(
                f"the prompt has {length} tokens; this model takes {self._max_len}, prompt and answer together",
                param="prompt",
            )
        return blocks_for(min(length, self._budget))

    def add(self, request: int, job: Job) -> None:
        assert isinstance(job, GenerateJob), "prepare() refuses other jobs"
        params = job.sampling
        self._sequences[request] = Running(
            request,
            job,
            limit=min(len(job.prompt) + params.max_tokens, self._max_len),
            eos=self._text.eos,
            seed=int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed,
            decode=self._text.decoder(skip_special_tokens=params.skip_special_tokens),
        )

    def drop(self, request: int) -> None:
        sequence = self._sequences.pop(request, None)
        self._started.discard(request)
        if sequence is not None:
            self._allocator.release(sequence.blocks.tolist())

    def preempt(self, request: int) -> int:
        sequence = self._sequences[request]
        self._started.discard(request)
        self._allocator.release(sequence.blocks.tolist())
        sequence.restart()
        return sequence.next_blocks(self._budget)

    def set_cache(self, frames: int) -> Mapping[int, int]:
        moves = self._allocator.set_limit(min(frames * self._frame_bytes // self._block_bytes, self._capacity))
        if moves:
            for request in self._started:
                sequence = self._sequences[request]
                sequence.blocks = np.array([moves.get(block, block) for block in sequence.blocks.tolist()], np.int64)
        return moves

    def plan(self, requests: Sequence[int]) -> GenerateStep | None:
        assert self._planned is None, "the last step is under way"
        named = [self._sequences[request] for request in requests if request in self._sequences]
        if not named:
            return None
        placed, taken = self._place(named)
        parts = [packed(part) for part in cut(placed, self._model.plan.shard.pipeline_parallel)]
        works = [work for part in parts for work in part]
        cleared = np.array([block for _, blocks in taken for block in blocks], np.int64)
        step = GenerateStep(tuple(map(pack, parts)), cleared, wants_only_likeliest(works))
        self._planned = _Planned(step, works, taken, len(placed))
        return step

    def finish(self, step: StepInput, output: StepOutput) -> StepResult:
        planned = self._planned
        assert planned is not None, "no step is under way"
        assert planned.step is step, "another step is under way"
        assert isinstance(output, TokensOutput | LogitsOutput), "the output is another task's"
        try:
            choices = choose(planned.works, output)
        except Exception as error:
            raise execution_error(error) from error
        self._planned = None
        return self._advance(planned, choices)

    def abandon(self, step: StepInput) -> None:
        planned = self._planned
        if planned is None or planned.step is not step:
            return
        self._planned = None
        for sequence, blocks in planned.taken:
            if sequence.request not in self._sequences:
                continue  # dropped meanwhile, with all its blocks
            sequence.blocks = sequence.blocks[: -len(blocks)]
            self._allocator.release(blocks)

    def empty_result(self) -> StepResult:
        return StepResult([], (), self._next_blocks())

    def _place(self, named: Sequence[Running]) -> tuple[list[Work], list[tuple[Running, list[int]]]]:
        """Share out the token budget and the free blocks: decoding sequences first, then prompts as they are named.

        Gives what is to be computed and (sequence, blocks it was given). Raises OutOfMemory if nobody can run.
        """
        placed: list[Work] = []
        taken: list[tuple[Running, list[int]]] = []
        budget, scored = self._budget, self._scored
        for sequence in sorted(named, key=lambda sequence: sequence.pending > 1):
            length = sequence.next_length(min(budget, scored) if sequence.wants_prompt_logprobs else budget)
            needed = blocks_for(sequence.computed + length) - len(sequence.blocks)
            blocks = self._allocator.take(max(needed, 0))
            if length == 0 or blocks is None:
                continue
            if blocks:
                sequence.blocks = np.concatenate([sequence.blocks, np.array(blocks, np.int64)])
                taken.append((sequence, blocks))
            placed.append(Work(sequence, sequence.computed, length))
            budget -= length
            scored -= length if sequence.wants_prompt_logprobs else 0
        if not placed:
            raise OutOfMemory(f"the KV cache has {self._allocator.limit} blocks, too few for any request of this step")
        return placed, taken

    def _advance(self, planned: _Planned, choices: Sequence[Choice]) -> StepResult:
        """The step has run: move every sequence on and say what it gave."""
        outputs: list[Output] = []
        finished: list[int] = []
        for work, choice in zip(planned.works, choices, strict=True):
            sequence = work.sequence
            if sequence.request not in self._sequences:
                continue  # it has failed with an earlier part of the step
            sequence.computed += work.length
            self._started.add(sequence.request)
            try:
                output = self._output(sequence, choice)
            except Exception as error:  # a tokenizer's: the others have advanced and go on
                output = FailedOutput(sequence.request, f"its text cannot be made: {type(error).__name__}: {error}")
            if output is None:
                continue
            outputs.append(output)
            if isinstance(output, FailedOutput) or output.finish_reason is not None:
                finished.append(sequence.request)
                self.drop(sequence.request)
        tokens = sum(work.length for work in planned.works)
        return StepResult(outputs, tuple(finished), self._next_blocks(), planned.batch_size, tokens)

    def _output(self, sequence: Running, choice: Choice) -> TextOutput | FailedOutput | None:
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += [self._text.describe(ranked) for ranked in choice.prompt]
        if choice.token == UNUSABLE:
            return FailedOutput(sequence.request, "the model gave no usable logits: they are all NaN or infinite")
        if choice.token is not None:
            logprobs = () if choice.ranked is None else (self._text.describe(choice.ranked),)
            return sequence.accept(choice.token, logprobs)
        if sequence.pending:
            return None
        return sequence.finish_prompt()

    def _next_blocks(self) -> dict[int, int]:
        return {request: self._sequences[request].next_blocks(self._budget) for request in self._started}
