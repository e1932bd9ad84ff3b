"""Prompts in all the forms that OpenAI and vLLM take, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from computron.api.context import Context
from computron.api.protocol import ServedModel, context_length
from computron.api.schemas import Message
from computron.errors import BadRequest, ContextTooLong

MAX_PROMPTS = 2048
ENCODED_MEANWHILE = 50  # characters that are encoded in the time that a prompt takes beside its length
Prompt = str | tuple[int, ...]


def split_prompts(value: str | list[Any], param: str) -> list[Prompt]:
    """A string, a list of strings, token ids, or a list of lists of token ids, as one prompt each.

    Raises BadRequest.
    """
    if isinstance(value, str):
        return [value]
    if not value:
        raise BadRequest(f"`{param}` must not be empty", param=param)
    if type(value[0]) is int:
        return [_token_ids(value, param)]
    if len(value) > MAX_PROMPTS:
        raise BadRequest(f"`{param}` has {len(value)} entries; at most {MAX_PROMPTS} are taken", param=param)
    return [_one_prompt(entry, f"{param}[{index}]") for index, entry in enumerate(value)]


def _one_prompt(value: Any, param: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _token_ids(value, param)
    raise BadRequest(f"`{param}` must be a string or a list of token ids", param=param)


def _token_ids(value: list[Any], param: str) -> tuple[int, ...]:
    for index, token in enumerate(value):
        if type(token) is not int or token < 0:
            raise BadRequest(f"`{param}[{index}]` must be a token id: a whole number from 0", param=f"{param}[{index}]")
    return tuple(value)


async def read_prompts(
    context: Context,
    served: ServedModel,
    value: str | list[Any],
    *,
    special: bool,
    truncate: int | None,
    param: str,
) -> list[tuple[Prompt, tuple[int, ...]]]:
    """Each prompt of a call as it was given and as token ids, off the event loop if they are long together.

    Raises BadRequest.
    """

    def read() -> list[tuple[Prompt, tuple[int, ...]]]:
        prompts = split_prompts(value, param)
        return [(prompt, cut_prompt(served, _encoded(served, prompt, special), truncate, param)) for prompt in prompts]

    return await context.compute(_size(value), read)


def _encoded(served: ServedModel, prompt: Prompt, special: bool) -> tuple[int, ...]:
    return tuple(served.loaded.encode(prompt, add_special_tokens=special)) if isinstance(prompt, str) else prompt


def _size(value: str | list[Any]) -> int:
    """Characters and token ids in all, and the constant part of each prompt."""
    if isinstance(value, str) or len(value) > MAX_PROMPTS or (value and type(value[0]) is int):
        return len(value)
    return sum(ENCODED_MEANWHILE + (len(entry) if isinstance(entry, str | list) else 0) for entry in value)


def cut_prompt(served: ServedModel, tokens: tuple[int, ...], truncate: int | None, param: str) -> tuple[int, ...]:
    """At least one token; `truncate` keeps that many of the last ones, -1 what the model can take.

    Raises BadRequest.
    """
    if truncate is not None:
        limit = context_length(served)
        keep = limit if truncate == -1 else truncate
        if not 0 < keep <= limit:
            raise BadRequest(
                f"`truncate_prompt_tokens` must be -1 or from 1 to {limit}", param="truncate_prompt_tokens"
            )
        tokens = tokens[-keep:]
    if not tokens:
        raise BadRequest(f"`{param}` must not be empty", param=param)
    return tokens


def check_length(served: ServedModel, tokens: Sequence[int], param: str) -> None:
    """For models that answer in one run. Raises ContextTooLong."""
    limit = context_length(served)
    if len(tokens) > limit:
        raise ContextTooLong(
            f"This model's maximum context length is {limit} tokens. However, your input has {len(tokens)} tokens. "
            "Please reduce the length of the input.",
            param=param,
        )


async def render_chat(
    context: Context,
    served: ServedModel,
    messages: list[Message],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    special: bool,
    template_arguments: Mapping[str, Any],
) -> tuple[int, ...]:
    """The chat as token ids. Raises BadRequest."""
    if not messages:
        raise BadRequest("`messages` must not be empty", param="messages")
    if add_generation_prompt and continue_final_message:
        raise BadRequest(
            "`add_generation_prompt` and `continue_final_message` cannot both be true", param="continue_final_message"
        )
    plain = [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    arguments = dict(template_arguments)
    arguments["continue_final_message"] = bool(continue_final_message)
    arguments["add_generation_prompt"] = (
        not continue_final_message if add_generation_prompt is None else add_generation_prompt
    )
    loaded = served.loaded

    def render() -> list[int]:
        return loaded.encode(loaded.render_chat(plain, **arguments), add_special_tokens=special)

    size = sum(len(message["content"]) for message in plain)
    return tuple(await context.compute(size, render))


def _plain_message(message: Message, param: str) -> dict[str, Any]:
    """The message as templates know it: its content one string."""
    plain: dict[str, Any] = {"role": message.role, "content": _plain_content(message.content, f"{param}.content")}
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    return plain


def _plain_content(content: str | list[Any] | None, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{param}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRequest(f"`{param}` must be an object with a type", param=param)
    kind = part.get("type", "text" if "text" in part else None)
    if kind != "text":
        raise BadRequest(
            f'`{param}`: parts of type "{kind}" are not taken; this model reads text', param=f"{param}.type"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest(f"`{param}.text` must be a string", param=f"{param}.text")
    return text
