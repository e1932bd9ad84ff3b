"""What travels between the leader, which plans steps, and the nodes, which run them: plain data, no requests.

Numpy arrays are int64 unless said otherwise, torch tensors are on the CPU where they travel. Arrays that came from
another node may be read-only.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch


class TokenBatch(msgspec.Struct, frozen=True, eq=False):
    """Tokens of several sequences that one forward computes, packed without padding: sequence i gives `lengths[i]`.

    Single tokens come first, of the longest sequence first; see `attention_plan`.
    """

    tokens: np.ndarray  # [sum of lengths]
    starts: np.ndarray  # [sequences]: tokens that the sequence has in the cache already
    lengths: np.ndarray  # [sequences]
    blocks: np.ndarray  # of each sequence those that hold its starts[i] + lengths[i] tokens, one sequence after another
    rows: np.ndarray  # places in `tokens` whose logits are wanted, ascending


class GenerateStep(msgspec.Struct, frozen=True, eq=False, tag=True):
    """`parts` are computed one after the other; a later one may go on with a sequence of an earlier one.

    `cleared`: blocks to zero before all parts. `greedy`: the likeliest token of each row is all that is wanted.
    """

    parts: tuple[TokenBatch, ...]
    cleared: np.ndarray
    greedy: bool


class TextBatch(msgspec.Struct, frozen=True, eq=False):
    """Whole texts that share a forward, without their padding."""

    tokens: np.ndarray  # [sum of lengths], one text after another
    lengths: np.ndarray  # [texts]


class TextStep(msgspec.Struct, frozen=True, eq=False, tag=True):
    """One forward for each batch."""

    batches: tuple[TextBatch, ...]


class ImageStep(msgspec.Struct, frozen=True, eq=False, tag=True):
    """One forward for each batch, [images, channels, height, width]."""

    batches: tuple[torch.Tensor, ...]


class CustomStep(msgspec.Struct, frozen=True, eq=False, tag=True):
    """For each forward the module's positional arguments, on the CPU.

    To travel they must be made of tensors, arrays, numbers, strings, lists and dicts; tuples inside arrive as lists.
    """

    batches: tuple[tuple[Any, ...], ...]


StepInput = GenerateStep | TextStep | ImageStep | CustomStep


class TokensOutput(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Of a greedy GenerateStep: the likeliest token of each of its rows, part after part; UNUSABLE where none is."""

    tokens: np.ndarray


class LogitsOutput(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Of any other GenerateStep: [rows, vocabulary], part after part; on the device where it does not travel."""

    logits: torch.Tensor


class RowsOutput(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Of a TextStep or ImageStep: [texts or images, width], float32, batch after batch."""

    rows: np.ndarray


class BatchResult(msgspec.Struct, frozen=True, eq=False):
    """What the module gave for one batch, or, if `error` is not empty, what it raised."""

    value: Any = None
    error: str = ""


class CustomStepOutput(msgspec.Struct, frozen=True, eq=False, tag=True):
    """Of a CustomStep: one result for each batch. What has been said of its arguments holds for the values."""

    results: tuple[BatchResult, ...]


StepOutput = TokensOutput | LogitsOutput | RowsOutput | CustomStepOutput
