"""The tokens of one step, packed without padding into one row, and the forward pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from computron.execution.attention_plan import AttentionPlan, packing_order
from computron.execution.kv_cache import KVCache
from computron.execution.sequence import Running


@dataclass(frozen=True, slots=True)
class Work:
    """`length` tokens of a sequence that this step computes; `row`: the place of the first one in the packed row."""

    sequence: Running
    length: int
    row: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's last token is among them, so that the next one can be chosen."""
        return self.length == self.sequence.pending

    @property
    def logit_rows(self) -> range:
        """The rows whose logits are needed."""
        end = self.row + self.length
        if self.sequence.wants_prompt_logprobs:
            return range(self.row, end)
        return range(end - 1, end) if self.completes else range(0)


class PackedBatch:
    """`works` in the order in which they are packed; `tokens` in all."""

    def __init__(self, placed: Sequence[tuple[Running, int]]) -> None:
        """`placed`: sequences with the number of tokens of each that this step computes; their blocks are there."""
        self._chunks = [sequence.chunk(length) for sequence, length in placed]
        order = packing_order(self._chunks)
        self._chunks = [self._chunks[index] for index in order]
        self.works: list[Work] = []
        self.tokens = 0
        for index in order:
            sequence, length = placed[index]
            self.works.append(Work(sequence, length, self.tokens))
            self.tokens += length

    def forward(self, module: nn.Module, cache: KVCache, windows: set[int | None]) -> torch.Tensor:
        """Write the keys and values of all tokens. `windows`: as in `AttentionPlan`.

        Gives the logits, [rows, vocabulary], of the works' `logit_rows`, one work after the other.
        """
        ids: list[int] = []
        for work in self.works:
            computed = work.sequence.computed
            ids += work.sequence.tokens[computed : computed + work.length]
        rows = [row for work in self.works for row in work.logit_rows]
        # Without a row that is needed the head would have no input: it gets one, whose logits nobody reads.
        plan = AttentionPlan(cache, self._chunks, windows, [np.array([ids]), np.array(rows or [0])])
        input_ids, kept = plan.extras
        output = module(
            input_ids=input_ids,
            position_ids=plan.positions[None],
            use_cache=False,
            logits_to_keep=kept,
            attention_plan=plan,
        )
        logits: torch.Tensor = output.logits[0]
        return logits[: len(rows)]
