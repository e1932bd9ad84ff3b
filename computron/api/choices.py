"""One answer to one prompt, gathered from its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from computron.api.answers import Usage
from computron.errors import ExecutionFailed
from computron.execution.requests import Output, TextOutput, TokenLogprob


def text_output(output: Output) -> TextOutput:
    if not isinstance(output, TextOutput):
        raise ExecutionFailed(f"the model answered with {type(output).__name__} where text was expected")
    return output


@dataclass(slots=True)
class Choice:
    """`tokens`: how many were generated until now; `token_ids`: those that no stream has sent."""

    prompt: Sequence[int]
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET

    def add(self, output: TextOutput) -> None:
        self.text.append(output.text)
        self.logprobs.extend(output.logprobs)
        self.token_ids.extend(output.tokens)
        self.progress(output)

    def progress(self, output: TextOutput) -> None:
        """Count the output without keeping its text: a stream has sent it."""
        self.tokens += len(output.tokens)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.stop_reason = UNSET if output.stop_reason is None else output.stop_reason


def usage(prompts: Iterable[Sequence[int]], choices: Iterable[Choice]) -> Usage:
    """Each prompt counts once, however many answers it got."""
    read = sum(len(prompt) for prompt in prompts)
    written = sum(choice.tokens for choice in choices)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
