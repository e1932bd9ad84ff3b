"""Which tokens may be drawn: temperature, top-k, top-p, min-p, as transformers' logits processors define them.

Filters need the likeliest tokens in order. Sorting a whole vocabulary for each token would cost more than running a
small model, so a row is first tried with its likeliest few, and again with more if those cannot decide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

WIDTHS = (256, 4096)  # likeliest tokens to look at first, and then; at last all are looked at


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """One row's settings. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `temperature` is above 0."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_off(self) -> bool:
        return self.top_k == 0 and self.top_p >= 1.0 and self.min_p == 0.0


def draw(logits: torch.Tensor, settings: Sequence[FilterSettings], uniforms: Sequence[float]) -> torch.Tensor:
    """One token for each row of `logits`, [rows, vocabulary], float32; `uniforms` in [0, 1) decide. -> [rows], int64.

    A row's token depends on that row, its settings and its number alone. Rows without a finite logit give -1.
    """
    device = logits.device
    values = [(s.temperature, s.top_k, s.top_p, s.min_p, point) for s, point in zip(settings, uniforms, strict=True)]
    # One copy to the device, not five: each may have to queue behind those of a swap.
    columns = torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True).unbind(1)
    scaled = logits / columns[0].float()[:, None]
    tokens = torch.empty(len(settings), dtype=torch.int64, device=device)
    plain = [row for row, setting in enumerate(settings) if setting.is_off]
    if plain:
        tokens[plain] = _pick(torch.softmax(scaled[plain], -1), columns[4][plain])
    pending = [row for row, setting in enumerate(settings) if not setting.is_off]
    vocabulary = logits.shape[1]
    for width in (*(width for width in WIDTHS if width < vocabulary), vocabulary):
        tried = [row for row in pending if settings[row].top_k < width or width == vocabulary]
        if not tried:
            continue
        drawn, decided = _draw_filtered(scaled[tried], *(column[tried] for column in columns[1:]), width=width)
        tokens[tried] = drawn
        accepted = {row for row, sure in zip(tried, decided.tolist(), strict=True) if sure}
        pending = [row for row in pending if row not in accepted]
    return tokens


def _draw_filtered(
    scaled: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    points: torch.Tensor,
    *,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the `width` likeliest tokens; the second tells for which rows no other token could matter."""
    values, candidates = scaled.topk(width, dim=-1)
    kept, decided = _kept(values, torch.logsumexp(scaled, -1), top_k, top_p, min_p)
    if width == scaled.shape[1]:
        decided = torch.ones_like(decided)
    positions = _pick(torch.softmax(values.masked_fill(~kept, -torch.inf), -1), points)
    tokens = candidates.gather(1, positions.clamp_min(0)[:, None])[:, 0]
    return torch.where(positions < 0, positions, tokens), decided


def _kept(
    values: torch.Tensor, total: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a row's likeliest tokens pass top-k, then top-p, then min-p.

    `values`: [rows, width], scaled logits in falling order. `total`: [rows], log of the sum of all exponentials.
    Gives [rows, width] and, [rows], whether every token that could pass is among the candidates.
    """
    width = values.shape[1]
    limited = (top_k > 0) & (top_k <= width)
    last = torch.where(limited, top_k, width).long() - 1
    # Equal logits at the k-th place all stay, so the last candidate must lie below it to know them all.
    threshold = torch.where(limited, values.gather(1, last[:, None])[:, 0], -torch.inf)
    kept = values >= threshold[:, None]
    decided = limited & (values[:, -1] < threshold)
    # Probabilities after top-k; where that is off, among all tokens.
    normalizer = torch.where(limited, torch.logsumexp(values.masked_fill(~kept, -torch.inf), -1), total)
    probabilities = torch.exp(values - normalizer[:, None]).masked_fill(~kept, 0.0)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    nucleus[:, 0] = True
    decided |= (top_p < 1.0) & ~limited & ~nucleus[:, -1]
    kept &= nucleus
    floor = values[:, 0] + torch.log(min_p)  # -inf where it is off
    kept &= values >= floor[:, None]
    decided |= values[:, -1] < floor
    return kept, decided


def _pick(probabilities: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The index at which each row's running sum first exceeds its point's share of the total; -1 if that is NaN."""
    sums = probabilities.to(torch.float64).cumsum(-1)
    totals = sums[:, -1]
    index = torch.searchsorted(sums, (points * totals)[:, None], right=True)[:, 0]
    # Rounding may put the point on the total itself: the last token with any probability is meant.
    last = (sums < totals[:, None]).sum(-1)
    return torch.where(totals > 0, torch.minimum(index, last), -1)
