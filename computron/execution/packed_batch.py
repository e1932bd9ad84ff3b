"""The tokens of one step: whose they are, in which parts they are computed, and how a part is packed into one row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from computron.execution.attention_plan import packing_key
from computron.execution.blocks import blocks_for
from computron.execution.sequence import Running
from computron.execution.steps import TokenBatch

# Tokens that a part has at least. With fewer, a layer takes about as long as it does for this many, since it is the
# reading of its weights that takes the time: two smaller parts would not pass through the stages any sooner than one.
LEAST_PART_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens [start, start + length) of a sequence, which one part of a step computes."""

    sequence: Running
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def completes(self) -> bool:
        """Whether the sequence's last token is among them, so that the next one can be chosen."""
        return self.end == len(self.sequence.tokens)

    @property
    def rows(self) -> int:
        """The tokens, counted from the last one, whose logits are wanted."""
        return self.length if self.sequence.wants_prompt_logprobs else int(self.completes)


def cut(works: Sequence[Work], most: int) -> list[list[Work]]:
    """Up to `most` parts of about equal length, the first with all single tokens; long works are cut, in order."""
    left = sum(work.length for work in works)
    count = min(most, left // LEAST_PART_TOKENS)
    if count < 2:
        return [list(works)]
    prompts = deque(work for work in works if work.length > 1)
    part = [work for work in works if work.length == 1]
    parts: list[list[Work]] = []
    for parts_left in range(count, 0, -1):
        room = -(-left // parts_left) - len(part)
        left -= len(part)
        while prompts and room > 0:
            work = prompts.popleft()
            length = min(room, work.length)
            part.append(Work(work.sequence, work.start, length))
            if length < work.length:
                prompts.appendleft(Work(work.sequence, work.start + length, work.length - length))
            room -= length
            left -= length
        if part:
            parts.append(part)
        part = []
    return parts


def packed(works: Sequence[Work]) -> list[Work]:
    """In the order in which `pack` takes them."""
    return sorted(works, key=lambda work: packing_key(work.start, work.length))


def pack(works: Sequence[Work]) -> TokenBatch:
    """`works`: in the order of `packed`, their sequences' blocks are there."""
    tokens: list[int] = []
    rows: list[int] = []
    for work in works:
        tokens += work.sequence.tokens[work.start : work.end]
        rows += range(len(tokens) - work.rows, len(tokens))
    return TokenBatch(
        tokens=np.array(tokens, np.int64),
        starts=np.array([work.start for work in works], np.int64),
        lengths=np.array([work.length for work in works], np.int64),
        blocks=np.concatenate([work.sequence.blocks[: blocks_for(work.end)] for work in works]),
        rows=np.array(rows, np.int64),
    )
