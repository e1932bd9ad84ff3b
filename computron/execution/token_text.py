"""A model's tokens as text, and where its answers end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from computron.execution.requests import TokenLogprob
from computron.execution.sampling import Ranked
from computron.execution.text import Decode
from computron.models import LoadedModel


class TokenText:
    """`eos`: the tokens that end an answer."""

    def __init__(self, model: LoadedModel) -> None:
        self.eos = model.eos_token_ids
        self._tokenizer: Any = model.tokenizer
        self._single: dict[int, str] = {}
        self._decode_all = self.decoder(skip_special_tokens=False)

    def decoder(self, *, skip_special_tokens: bool) -> Decode:
        """Text of token ids as they are, without any cleaning up."""
        if isinstance(self._tokenizer, PreTrainedTokenizerFast):
            fast = self._tokenizer.backend_tokenizer  # several times quicker than through transformers

            def decode(tokens: Sequence[int]) -> str:
                return str(fast.decode(tokens, skip_special_tokens=skip_special_tokens))

        else:
            slow = self._tokenizer

            def decode(tokens: Sequence[int]) -> str:
                return str(
                    slow.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
                )

        return decode

    def describe(self, ranked: Ranked) -> TokenLogprob:
        """With the text of each token by itself."""
        top = tuple((token, self._text(token), logprob) for token, logprob in ranked.top)
        return TokenLogprob(ranked.token, self._text(ranked.token), ranked.logprob, top)

    def _text(self, token: int) -> str:
        text = self._single.get(token)
        if text is None:
            text = self._single[token] = self._decode_all([token])
        return text
