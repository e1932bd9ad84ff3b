"""Attention over the paged cache, as a function that transformers' models call in each layer.

It is registered with transformers under `IMPLEMENTATION`. No mask function is registered beside it on purpose: then
transformers builds no mask at all and passes None, and `AttentionPlan`, which travels with the forward's keyword
arguments as `attention_plan`, says who sees what.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from computron.execution.attention_plan import AttentionPlan, Part

IMPLEMENTATION = "computron_paged"


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    attention_plan: AttentionPlan | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """`query`: [1, heads, tokens, dim], `key`, `value`: [1, key-value heads, tokens, dim] -> [1, tokens, heads, dim].

    `s_aux`: a logit for each head that takes its share of the attention and gives nothing (attention sinks).
    Raises RuntimeError if the model asks for something that it cannot do.
    """
    if attention_plan is None:
        raise RuntimeError(f"{type(module).__name__} does not pass keyword arguments on to its attention")
    if position_bias is not None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} uses an attention bias, which the paged cache does not support")
    cache = attention_plan.cache
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    cache.write(layer, attention_plan.slots, key, value)
    outputs = []
    for part in attention_plan.parts(sliding_window):
        if part.rows is None:
            keys, values = key[:, :, part.begin : part.end], value[:, :, part.begin : part.end]
        else:
            keys, values = cache.read(layer, part.rows, part.batch)
        queries = _fold(query, part, keys.shape[1])
        if softcap is None and s_aux is None:
            output = scaled_dot_product_attention(
                queries,
                *_spread(part, keys, values, queries),
                attn_mask=part.mask,
                scale=scaling,
                is_causal=part.rows is None and part.mask is None,
            )
        else:
            output = _explicit_attention(queries, *_spread(part, keys, values, queries), part, scaling, softcap, s_aux)
        outputs.append(_unfold(output, part))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed.unsqueeze(0), None


def _is_single(part: Part) -> bool:
    return part.end - part.begin == part.batch


def _fold(query: torch.Tensor, part: Part, key_heads: int) -> torch.Tensor:
    """Group query heads by the key-value head they share, without copying keys.

    Single tokens: [batch, key heads, group, dim], the group in the place of the query length.
    A chunk: [key heads, group, tokens, dim], the key heads in the place of the batch.
    """
    tokens = query[0, :, part.begin : part.end]
    grouped = tokens.view(key_heads, -1, *tokens.shape[1:])
    return grouped.permute(2, 0, 1, 3) if _is_single(part) else grouped


def _spread(
    part: Part, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [batch, key heads, tokens, dim], as they fit the folded queries."""
    if _is_single(part):
        return keys, values
    group = queries.shape[1]
    return keys.transpose(0, 1).expand(-1, group, -1, -1), values.transpose(0, 1).expand(-1, group, -1, -1)


def _unfold(output: torch.Tensor, part: Part) -> torch.Tensor:
    """Back to [tokens, heads, dim]."""
    return output.flatten(1, 2) if _is_single(part) else output.permute(2, 0, 1, 3).flatten(1, 2)


def _explicit_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    part: Part,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What the fused kernels cannot do: capped scores and sinks."""
    scores = torch.matmul(queries, keys.transpose(2, 3)) * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if part.mask is not None:
        scores = scores + part.mask
    elif part.rows is None:
        length = part.end - part.begin
        hidden = torch.ones((length, length), dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1, dtype=torch.float32)
    else:
        heads = sinks.view(keys.shape[1], -1, 1) if _is_single(part) else sinks.view(keys.shape[0], -1, 1, 1)
        with_sinks = torch.cat([scores, heads.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        weights = torch.softmax(with_sinks, -1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)


AttentionInterface.register(IMPLEMENTATION, paged_attention)
