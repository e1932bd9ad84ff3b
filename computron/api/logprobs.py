"""Log probabilities in the formats of completions, chat completions, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence

from computron.api.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from computron.execution.requests import TokenLogprob

FLOOR = -9999.0  # JSON has no -inf; this is what OpenAI and vLLM send for it


class CompletionLogprobsWriter:
    """Log probabilities of one choice, piece by piece: it knows at which character of the text it is."""

    def __init__(self, as_ids: bool) -> None:
        self._as_ids = as_ids
        self._offset = 0

    def write(self, entries: Sequence[TokenLogprob | None], first: tuple[int, str] = (0, "")) -> CompletionLogprobs:
        """`first`: id and text of the entry that is None, the prompt's first token, which nothing predicts."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            result.text_offset.append(self._offset)
            if entry is None:
                result.tokens.append(_name(*first, self._as_ids))
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                self._offset += len(first[1])
                continue
            name = _name(entry.token, entry.text, self._as_ids)
            top = {name: max(FLOOR, entry.logprob)}
            for token, text, logprob in entry.top:
                top.setdefault(_name(token, text, self._as_ids), max(FLOOR, logprob))
            result.tokens.append(name)
            result.token_logprobs.append(top[name])
            result.top_logprobs.append(top)
            self._offset += len(entry.text)
        return result


def chat_logprobs(entries: Sequence[TokenLogprob], as_ids: bool) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=_name(entry.token, entry.text, as_ids),
                logprob=max(FLOOR, entry.logprob),
                bytes=list(entry.text.encode()),
                top_logprobs=[
                    TopLogprob(token=_name(token, text, as_ids), logprob=max(FLOOR, logprob), bytes=list(text.encode()))
                    for token, text, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
    """vLLM's format: by token id, the prompt's own token and the likeliest ones."""
    return [None if entry is None else _by_id(entry) for entry in entries]


def _by_id(entry: TokenLogprob) -> dict[str, PromptLogprob]:
    result = {
        str(token): PromptLogprob(logprob=max(FLOOR, logprob), rank=rank, decoded_token=text)
        for rank, (token, text, logprob) in enumerate(entry.top, 1)
    }
    own = PromptLogprob(logprob=max(FLOOR, entry.logprob), rank=None, decoded_token=entry.text)
    result.setdefault(str(entry.token), own)
    return result


def _name(token: int, text: str, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else text
