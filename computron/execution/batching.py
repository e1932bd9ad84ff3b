"""Requests that one forward answers: which of them share a batch, and how a batch of texts is padded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from computron.errors import BadRequest, ComputronError, ContextTooLong, ExecutionFailed
from computron.execution.steps import TextBatch
from computron.models import LoadedModel

Item = TypeVar("Item")


def check_tokens(model: LoadedModel, tokens: Sequence[int], param: str) -> None:
    """Raises BadRequest for no tokens or ids outside the vocabulary, ContextTooLong for too many."""
    if not tokens:
        raise BadRequest("the input is empty: it must have at least one token", param=param)
    check_vocabulary(model, tokens, param)
    longest = model.plan.max_model_len
    if longest and len(tokens) > longest:
        raise ContextTooLong(f"the input has {len(tokens)} tokens; this model takes {longest}", param=param)


def check_vocabulary(model: LoadedModel, tokens: Iterable[int], param: str) -> None:
    """Raises BadRequest for ids outside the vocabulary."""
    vocabulary = model.plan.vocabulary
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise BadRequest(f"token id {wrong} is outside the vocabulary, 0 to {vocabulary - 1}", param=param)


def by_length(
    items: Sequence[Item], length: Callable[[Item], int], *, most_items: int, most_tokens: int
) -> list[list[Item]]:
    """Batches of neighbours in length, so that little is padding; each within both limits, or of one item."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=length):
        last = batches[-1] if batches else []
        if last and len(last) < most_items and (len(last) + 1) * length(item) <= most_tokens:
            last.append(item)
        else:
            batches.append([item])
    return batches


def by_group(items: Sequence[Item], group: Callable[[Item], Hashable], most_items: int) -> list[list[Item]]:
    """Batches of items of equal groups, in the order in which the groups first come."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    return [members[i : i + most_items] for members in groups.values() for i in range(0, len(members), most_items)]


def padding_id(model: LoadedModel) -> int | None:
    """The token that the model itself takes for padding; None if it knows none."""
    token = getattr(model.module.config, "pad_token_id", None)
    return None if token is None else int(token)


def join_texts(texts: Sequence[Sequence[int]]) -> TextBatch:
    """Texts of at least one token each, as one batch."""
    tokens = np.array(list(itertools.chain.from_iterable(texts)), np.int64)
    return TextBatch(tokens, np.array([len(text) for text in texts], np.int64))


@dataclass(frozen=True, slots=True)
class PaddedTexts:
    """`ids`: [texts, longest], padded on the right. `lengths`: [texts]. `mask`: 1 for tokens; None without padding."""

    ids: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor | None


def pad(batch: TextBatch, padding: int, device: torch.device) -> PaddedTexts:
    """The texts on the device."""
    inside = np.arange(batch.lengths.max()) < batch.lengths[:, None]
    ids = np.full(inside.shape, padding, np.int64)
    ids[inside] = batch.tokens
    arrays = [ids, batch.lengths.copy()] if inside.all() else [ids, batch.lengths.copy(), inside.astype(np.int64)]
    moved = [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
    return PaddedTexts(moved[0], moved[1], moved[2] if len(moved) > 2 else None)


def execution_error(error: Exception) -> ComputronError:
    """What a failed forward is to the rest of the program: our own errors as they are, others with their words."""
    if isinstance(error, ComputronError):
        return error
    return ExecutionFailed(f"the model failed: {type(error).__name__}: {error}")
