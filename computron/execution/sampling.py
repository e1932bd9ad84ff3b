"""The next token of each sequence of a batch, whatever mixture of settings the batch holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from computron.execution.filters import FilterSettings, draw
from computron.execution.requests import SamplingParams

UNUSABLE = -1  # in the place of a token: no logit of the row was a number that could be compared


@dataclass(frozen=True, slots=True)
class Ranked:
    """Log probability of a token that was chosen, and (token, log probability) of the likeliest ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class SamplingState:
    """What the choice of one sequence's next token depends on besides the logits.

    `ending`: the tokens that may not come before `min_tokens`. `seed`: any integer; the n-th token depends on it and n.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], ending: Sequence[int], seed: int) -> None:
        self.params = params
        self.generated = 0
        self.is_greedy = params.temperature == 0.0
        self._ending = list(ending)
        self._seed = (seed % (1 << 64)).to_bytes(8, "little")
        self._counts: Counter[int] = Counter()
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self.filters = (
            None
            if self.is_greedy
            else FilterSettings(params.temperature, max(params.top_k, 0), params.top_p, params.min_p)
        )
        self._penalised = (
            params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
        )

    def append(self, token: int) -> None:
        self.generated += 1
        if self._penalised:
            self._counts[token] += 1

    @property
    def adjusts(self) -> bool:
        """Whether the logits have to be changed before the choice."""
        return self._penalised or bool(self.params.logit_bias) or self._forbids_ending

    @property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token of the logits as they are is the one."""
        return self.is_greedy and not self.adjusts

    @property
    def _forbids_ending(self) -> bool:
        return self.generated < self.params.min_tokens and bool(self._ending)

    def uniform(self) -> float:
        """In [0, 1), the same for the same seed and place in the sequence."""
        digest = hashlib.blake2b(self.generated.to_bytes(8, "little"), digest_size=8, key=self._seed).digest()
        return (int.from_bytes(digest, "little") >> 11) / (1 << 53)

    def adjust(self, logits: torch.Tensor) -> None:
        """Change `logits`, [vocabulary], in place: bias, penalties, no ending before `min_tokens`."""
        params = self.params
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias.keys()), device=logits.device)
            logits[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        if params.repetition_penalty != 1.0:
            seen = self._prompt.union(self._counts)
            tokens = torch.tensor(list(seen), dtype=torch.int64, device=logits.device)
            there = logits[tokens]
            penalty = params.repetition_penalty
            logits[tokens] = torch.where(there < 0, there * penalty, there / penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            tokens = torch.tensor(list(self._counts.keys()), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty
        if self._forbids_ending:
            logits[torch.tensor(self._ending, device=logits.device)] = -torch.inf


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One token for each row of `logits`, [rows, vocabulary]; UNUSABLE where there is none.

    Neither the states nor `logits` are changed.
    """
    adjusted = [row for row, state in enumerate(states) if state.adjusts]
    if adjusted:
        logits = logits.to(torch.float32, copy=True)
    for row in adjusted:
        states[row].adjust(logits[row])
    greedy = [row for row, state in enumerate(states) if state.is_greedy]
    if len(greedy) == len(states):
        return likeliest(logits).tolist()
    drawn = [row for row, state in enumerate(states) if not state.is_greedy]
    tokens = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    tokens[drawn] = draw(
        logits[drawn].float(),
        [settings for state in states if (settings := state.filters) is not None],
        [states[row].uniform() for row in drawn],
    )
    if greedy:
        tokens[greedy] = likeliest(logits[greedy])
    return tokens.tolist()


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocabulary] -> [rows]: UNUSABLE where no logit is finite."""
    values, tokens = logits.max(-1)
    return torch.where(values.isfinite(), tokens, UNUSABLE)


@torch.inference_mode()
def rank(logits: torch.Tensor, chosen: Sequence[int], alternatives: Sequence[int]) -> list[Ranked]:
    """Log probabilities under unchanged `logits`, [rows, vocabulary]: of `chosen`, and of so many alternatives."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(alternatives), logprobs.shape[1])
    values, tokens = logprobs.topk(most, dim=-1)
    rows = zip(chosen, own, tokens.tolist(), values.tolist(), alternatives, strict=True)
    return [
        Ranked(token, logprob, tuple(zip(top[:count], top_values[:count], strict=True)))
        for token, logprob, top, top_values, count in rows
    ]
