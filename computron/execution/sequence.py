"""One sequence that is being continued: its tokens, its place in the cache, and what of its text has left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from computron.execution.blocks import blocks_for
from computron.execution.kv_cache import Indices
from computron.execution.requests import FinishReason, GenerateJob, TextOutput, TokenLogprob
from computron.execution.sampling import SamplingState
from computron.execution.text import Detokenizer, StopStrings

PROMPT_LOGPROBS_CHUNK = 256  # tokens a step of a prompt whose logits are all needed: they take a vocabulary each


class Running:
    """`computed` of `tokens` have their keys and values in `blocks`; a step computes some of the rest.

    `limit`: tokens at which the sequence ends, its prompt included. `decode`: text of whole tokens.
    """

    def __init__(
        self,
        request: int,
        job: GenerateJob,
        *,
        limit: int,
        eos: frozenset[int],
        seed: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        params = job.sampling
        self.request = request
        self.params = params
        self.tokens = list(job.prompt)
        self.prompt_length = len(job.prompt)
        self.computed = 0
        self.blocks: Indices = np.empty(0, np.int64)
        self.limit = limit
        self._eos = frozenset() if params.ignore_eos else eos
        self.sampling = SamplingState(params, job.prompt, [*self._eos, *params.stop_token_ids], seed)
        self._detokenizer = Detokenizer(decode, job.prompt)
        self._stops = StopStrings(params.stop, keep=params.include_stop)
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if params.prompt_logprobs is None else [None]

    @property
    def pending(self) -> int:
        """Tokens whose keys and values have yet to be computed; at least 1."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None

    @property
    def wants_token(self) -> bool:
        """Whether a token may follow: no, if nothing but the prompt's log probabilities was asked for."""
        return self.limit > self.prompt_length

    def next_length(self, budget: int) -> int:
        """Tokens that the next step computes, if it has room for `budget`."""
        if self.wants_prompt_logprobs:
            budget = min(budget, PROMPT_LOGPROBS_CHUNK)
        return min(self.pending, budget)

    def next_blocks(self, budget: int) -> int:
        """Blocks that the sequence will hold after such a step."""
        return blocks_for(self.computed + self.next_length(budget))

    def restart(self) -> None:
        """Forget what is in the cache."""
        self.computed = 0
        self.blocks = np.empty(0, np.int64)
        if self.wants_prompt_logprobs:
            self.prompt_logprobs = [None]

    def accept(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> TextOutput:
        """Append the token that was chosen; gives the text that may leave, and whether the sequence has ended.

        1. eos or a stop token: it counts, but its text stays away unless `include_stop` is set.
        2. a stop string is complete: the text ends before it (behind it with `include_stop`).
        3. the limit is reached: what was held back leaves.
        """
        self.tokens.append(token)
        self.sampling.append(token)
        params, generated = self.params, self.sampling.generated
        may_end = generated >= params.min_tokens
        armed = generated > params.min_tokens
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if may_end and (token in self._eos or token in params.stop_token_ids):
            reason, stop_reason = "stop", None if token in self._eos else token
            piece = (self._detokenizer.append(token) if params.include_stop else "") + self._detokenizer.finish()
            text = self._stops.append(piece, armed=armed) + self._stops.finish()
        else:
            text = self._stops.append(self._detokenizer.append(token), armed=armed)
            if self._stops.found is None and len(self.tokens) >= self.limit:
                reason = "length"
                text += self._stops.append(self._detokenizer.finish(), armed=armed) + self._stops.finish()
        if self._stops.found is not None:
            reason, stop_reason = "stop", self._stops.found
        return TextOutput(self.request, (token,), text, logprobs, self._take_prompt_logprobs(), reason, stop_reason)

    def finish_prompt(self) -> TextOutput:
        """The end of a sequence that no token may follow."""
        return TextOutput(self.request, (), "", prompt_logprobs=self._take_prompt_logprobs(), finish_reason="length")

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log probabilities, once."""
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return None if taken is None else tuple(taken)
