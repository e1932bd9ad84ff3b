"""Continuous batching: a step computes one token of every sequence that decodes, and chunks of prompts beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from computron.errors import BadRequest, ContextTooLong, OutOfMemory
from computron.execution.attention import IMPLEMENTATION
from computron.execution.batching import check_vocabulary, execution_error
from computron.execution.blocks import BLOCK_TOKENS, BlockAllocator, blocks_for
from computron.execution.host_linear import speed_up_linears
from computron.execution.kv_cache import KVCache
from computron.execution.packed_batch import PackedBatch, Work
from computron.execution.positions import position_limit
from computron.execution.requests import FailedOutput, GenerateJob, Job, Output, StepResult, TextOutput
from computron.execution.sampling import UNUSABLE, Ranked, rank, sample
from computron.execution.sequence import Running
from computron.execution.token_text import TokenText
from computron.models import Gate, LoadedModel


@dataclass(frozen=True, slots=True)
class Choice:
    """What the logits of one work gave. `token`: None if none was wanted. `prompt`: of its prompt tokens, in order."""

    token: int | None
    ranked: Ranked | None
    prompt: list[Ranked]


class GenerateExecutor:
    """Serves `GenerateJob`s over a paged cache. `cache`: flat uint8, the whole virtual range of the KV cache."""

    def __init__(self, model: LoadedModel, cache: torch.Tensor, frame_bytes: int) -> None:
        plan = model.plan
        assert plan.cache is not None, "a model that generates has a cache"
        self._model = model
        module = model.module
        assert isinstance(module, PreTrainedModel), "what generates is a transformers model"
        module.set_attn_implementation(IMPLEMENTATION)
        if model.device.type == "cpu":
            speed_up_linears(module)
        self._cache = KVCache(plan.cache, cache)
        self._allocator = BlockAllocator()
        self._frame_bytes = frame_bytes
        self._budget = max(plan.config.max_batch_tokens, plan.config.max_batch_size)
        capacity = self._cache.capacity * BLOCK_TOKENS
        limits = (capacity, plan.max_model_len, position_limit(module.config))
        self._max_len = min(limit for limit in limits if limit)
        self._windows: set[int | None] = set()  # what the layers have asked for
        self._sequences: dict[int, Running] = {}
        self._started: set[int] = set()  # those that hold, or may come to hold, blocks
        self._text = TokenText(model)

    @property
    def blocks_per_frame(self) -> float:
        return self._frame_bytes / self._cache.block_bytes

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

    def set_cache(self, frames: int) -> None:
        limit = min(frames * self._frame_bytes // self._cache.block_bytes, self._cache.capacity)
        moves = self._allocator.set_limit(limit)
        if not moves:
            return
        self._cache.move(moves)
        for request in self._started:
            sequence = self._sequences[request]
            sequence.blocks = np.array([moves.get(block, block) for block in sequence.blocks.tolist()], np.int64)

    @torch.inference_mode()
    def step(self, requests: Sequence[int], gate: Gate) -> StepResult:
        named = [self._sequences[request] for request in requests if request in self._sequences]
        if not named:
            return StepResult([], (), self._next_blocks())
        placed, taken = self._place(named)
        batch = PackedBatch(placed)
        try:
            self._model.gate = gate
            logits = batch.forward(self._model.module, self._cache, self._windows)
            choices = _choose(batch.works, logits)
        except Exception as error:
            self._take_back(taken)
            raise execution_error(error) from error
        return self._advance(batch, choices)

    def _place(self, named: Sequence[Running]) -> tuple[list[tuple[Running, int]], list[tuple[Running, list[int]]]]:
        """Share out the token budget and the free blocks: decoding sequences first, then prompts as they are named.

        Gives (sequence, tokens to compute) and (sequence, blocks it was given). Raises OutOfMemory if nobody can run.
        """
        placed: list[tuple[Running, int]] = []
        taken: list[tuple[Running, list[int]]] = []
        budget = self._budget
        for sequence in sorted(named, key=lambda sequence: sequence.pending > 1):
            length = sequence.next_length(budget)
            needed = blocks_for(sequence.computed + length) - len(sequence.blocks)
            blocks = self._allocator.take(max(needed, 0))
            if length == 0 or blocks is None:
                continue
            if blocks:
                sequence.blocks = np.concatenate([sequence.blocks, np.array(blocks, np.int64)])
                taken.append((sequence, blocks))
            placed.append((sequence, length))
            budget -= length
        if not placed:
            raise OutOfMemory(f"the KV cache has {self._allocator.limit} blocks, too few for any request of this step")
        new = [block for _, blocks in taken for block in blocks]
        if new:
            self._cache.clear(new)
        return placed, taken

    def _take_back(self, taken: Sequence[tuple[Running, list[int]]]) -> None:
        for sequence, blocks in taken:
            sequence.blocks = sequence.blocks[: -len(blocks)]
            self._allocator.release(blocks)

    def _advance(self, batch: PackedBatch, choices: Sequence[Choice]) -> StepResult:
        """The forward has succeeded: move every sequence on and say what it gave."""
        outputs: list[Output] = []
        finished: list[int] = []
        for work, choice in zip(batch.works, choices, strict=True):
            sequence = work.sequence
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
        return StepResult(outputs, tuple(finished), self._next_blocks(), len(batch.works), batch.tokens)

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


def _choose(works: Sequence[Work], logits: torch.Tensor) -> list[Choice]:
    """The next token of each work that completes its sequence, with the log probabilities that were asked for."""
    ends = np.cumsum([len(work.logit_rows) for work in works]).tolist()
    chosen = [index for index, work in enumerate(works) if work.completes and work.sequence.wants_token]
    tokens: dict[int, int] = {}
    if chosen:
        rows = [ends[index] - 1 for index in chosen]
        selected = logits if len(rows) == len(logits) else logits[rows]
        tokens = dict(zip(chosen, sample(selected, [works[index].sequence.sampling for index in chosen]), strict=True))
    ranked: dict[int, Ranked] = {}
    asked = [
        (index, works[index].sequence.params.logprobs)
        for index, token in tokens.items()
        if token != UNUSABLE and works[index].sequence.params.logprobs is not None
    ]
    if asked:
        rows = [ends[index] - 1 for index, _ in asked]
        counts = [count or 0 for _, count in asked]
        given = rank(logits[rows], [tokens[index] for index, _ in asked], counts)
        ranked = {index: one for (index, _), one in zip(asked, given, strict=True)}
    return [
        Choice(tokens.get(index), ranked.get(index), _rank_prompt(work, logits[ends[index] - len(work.logit_rows) :]))
        for index, work in enumerate(works)
    ]


def _rank_prompt(work: Work, logits: torch.Tensor) -> list[Ranked]:
    """Of the prompt tokens that the work's own tokens predict. `logits`: from the work's first row on."""
    sequence = work.sequence
    if not sequence.wants_prompt_logprobs:
        return []
    first = sequence.computed + 1
    targets = sequence.tokens[first : min(first + work.length, sequence.prompt_length)]
    if not targets:
        return []
    return rank(logits[: len(targets)], targets, [sequence.params.prompt_logprobs or 0] * len(targets))
