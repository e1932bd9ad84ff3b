"""From tokens to text, piece by piece: nothing leaves that a later token could still change or a stop string cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 6  # of the prompt: what a decoder may need to know of the text before (spaces, half characters)

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of a growing sequence. Works with every tokenizer, as it only decodes short runs of whole tokens.

    A run is decoded with the tokens before it and without the run itself; the difference is the run's text. While
    that ends in a replacement character, it may be half of a character, and waits for the next token.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(prompt[-CONTEXT_TOKENS:])
        self._before = decode(self._context).rstrip(REPLACEMENT)  # half a character at its end will be completed
        self._run: list[int] = []

    def append(self, token: int) -> str:
        """The text that is now certain; empty while a character is incomplete."""
        self._run.append(token)
        text = self._run_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._run = self._run, []
        self._before = self._decode(self._context)
        return text

    def finish(self) -> str:
        """What was waiting, without the half character at its end."""
        text = self._run_text().rstrip(REPLACEMENT) if self._run else ""
        self._run = []
        return text

    def _run_text(self) -> str:
        return self._decode(self._context + self._run)[len(self._before) :]


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._keep = keep
        self._held = ""
        self.found: str | None = None

    def append(self, piece: str, *, armed: bool = True) -> str:
        """The text that may leave. Sets `found` at the first stop string; text after it is dropped.

        With `armed` false nothing in the piece or before it is, or begins, a stop string.
        """
        text = self._held + piece
        self._held = ""
        if not armed:
            return text
        matches = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if matches:
            position, self.found = min(matches, key=lambda match: (match[0] + len(match[1]), match[0]))
            return text[: position + len(self.found)] if self._keep else text[:position]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        if held:
            self._held = text[-held:]
            text = text[:-held]
        return text

    def finish(self) -> str:
        """What was held back, once no more text can come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
