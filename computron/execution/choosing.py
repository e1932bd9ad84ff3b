"""What the output of a step means for each of its works: the next token, and the log probabilities asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from computron.execution.packed_batch import Work
from computron.execution.sampling import UNUSABLE, Ranked, rank, sample
from computron.execution.steps import LogitsOutput, TokensOutput


@dataclass(frozen=True, slots=True)
class Choice:
    """What one work gave. `token`: None if none was wanted. `prompt`: of its prompt tokens, in order."""

    token: int | None
    ranked: Ranked | None
    prompt: list[Ranked]


def wants_only_likeliest(works: Sequence[Work]) -> bool:
    """Whether the likeliest token of each row is all that has to be known of the logits."""
    for work in works:
        sequence = work.sequence
        if sequence.wants_prompt_logprobs:
            return False
        if _chooses(work) and not (sequence.sampling.takes_likeliest and sequence.params.logprobs is None):
            return False
    return True


def choose(works: Sequence[Work], output: TokensOutput | LogitsOutput) -> list[Choice]:
    """`works`: of all parts, in the order in which they were packed."""
    ends = list(itertools.accumulate(work.rows for work in works))
    if isinstance(output, TokensOutput):
        given = output.tokens.tolist()
        return [
            Choice(given[end - 1] if _chooses(work) else None, None, []) for work, end in zip(works, ends, strict=True)
        ]
    return _choose_from(works, ends, output.logits)


def _chooses(work: Work) -> bool:
    return work.completes and work.sequence.wants_token


def _choose_from(works: Sequence[Work], ends: Sequence[int], logits: torch.Tensor) -> list[Choice]:
    """`ends`: behind each work's last row of `logits`."""
    chosen = [index for index, work in enumerate(works) if _chooses(work)]
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
        Choice(tokens.get(index), ranked.get(index), _rank_prompt(work, logits[ends[index] - work.rows :]))
        for index, work in enumerate(works)
    ]


def _rank_prompt(work: Work, logits: torch.Tensor) -> list[Ranked]:
    """Of the prompt tokens that the work's own tokens predict. `logits`: from the work's first row on."""
    sequence = work.sequence
    if not sequence.wants_prompt_logprobs:
        return []
    targets = sequence.tokens[work.start + 1 : min(work.end + 1, sequence.prompt_length)]
    if not targets:
        return []
    return rank(logits[: len(targets)], targets, [sequence.params.prompt_logprobs or 0] * len(targets))
