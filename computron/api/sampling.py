"""What a client asked of sampling, checked, with the model's own defaults where it asked nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from computron.api.protocol import GenerationDefaults, ServedModel, context_length
from computron.api.schemas import GenerationBody
from computron.errors import BadRequest, ContextTooLong
from computron.execution.requests import SamplingParams

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_TEMPERATURE = 2
MAX_STOPS = 64  # OpenAI takes 4, vLLM any number, and evaluations send more than 4
_INT64 = 1 << 63

_REFUSED = {
    "use_beam_search": "beam search is not offered",
    "bad_words": "bad words are not offered; `logit_bias` takes single tokens",
    "allowed_token_ids": "allowed token ids are not offered; `logit_bias` takes single tokens",
    "structured_outputs": "structured outputs are not offered",
    "guided_json": "guided decoding is not offered",
    "guided_regex": "guided decoding is not offered",
    "guided_choice": "guided decoding is not offered",
    "guided_grammar": "guided decoding is not offered",
}


def check_refused(body: GenerationBody) -> None:
    """Raises BadRequest for what this server knows of but does not do."""
    for name, why in _REFUSED.items():
        if getattr(body, name):
            raise BadRequest(f"`{name}`: {why}", param=name)
    if body.response_format is not None and body.response_format.type != "text":
        raise BadRequest(
            f'`response_format`: type "{body.response_format.type}" is not offered; only "text" is',
            param="response_format",
        )
    if body.stream_options is not None and not body.stream:
        raise BadRequest("`stream_options` can only be given with `stream`: true", param="stream_options")
    if body.stream and body.prompt_logprobs:
        raise BadRequest("`prompt_logprobs` cannot be given with `stream`: true", param="prompt_logprobs")


def choices(body: GenerationBody) -> int:
    """How many answers to each prompt. Raises BadRequest."""
    n = 1 if body.n is None else body.n
    _within("n", n, 1, MAX_CHOICES)
    return n


def sampling_params(
    body: GenerationBody, defaults: GenerationDefaults, max_tokens: int, *, logprobs: int | None, echo: bool = False
) -> SamplingParams:
    """`logprobs`: alternatives for each token, None for no log probabilities; with `echo` for the prompt's too.

    Raises BadRequest, naming the field that is out of its range.
    """
    temperature = _first(body.temperature, defaults.temperature, 1.0)
    top_p = _first(body.top_p, defaults.top_p, 1.0)
    top_k = int(_first(body.top_k, defaults.top_k, 0))
    min_p = _first(body.min_p, defaults.min_p, 0.0)
    repetition_penalty = _first(body.repetition_penalty, defaults.repetition_penalty, 1.0)
    presence_penalty = _first(body.presence_penalty, None, 0.0)
    frequency_penalty = _first(body.frequency_penalty, None, 0.0)
    min_tokens = body.min_tokens or 0
    if body.temperature is not None:
        _within("temperature", body.temperature, 0, MAX_TEMPERATURE)
    if not 0 < top_p <= 1:
        raise BadRequest(f"`top_p` must be more than 0 and at most 1, not {top_p}", param="top_p")
    if top_k < -1:
        raise BadRequest(f"`top_k` must be at least 1, or 0 or -1 for no limit, not {top_k}", param="top_k")
    _within("min_p", min_p, 0, 1)
    _within("presence_penalty", presence_penalty, -2, 2)
    _within("frequency_penalty", frequency_penalty, -2, 2)
    if not repetition_penalty > 0:
        raise BadRequest(
            f"`repetition_penalty` must be more than 0, not {repetition_penalty}", param="repetition_penalty"
        )
    _within("min_tokens", min_tokens, 0, max_tokens)
    if body.seed is not None:
        _within("seed", body.seed, -_INT64, _INT64 - 1)
    if body.prompt_logprobs is not None:
        _within("prompt_logprobs", body.prompt_logprobs, 0, MAX_LOGPROBS)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(0, top_k),
        min_p=min_p,
        seed=body.seed,
        stop=_stops(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo and logprobs is not None else body.prompt_logprobs,
    )


def seeded(params: SamplingParams, choice: int) -> SamplingParams:
    """For the answer of this number to a prompt: with a seed, each answer gets one of its own."""
    return params if params.seed is None or choice == 0 else replace(params, seed=params.seed + choice)


def check_logprobs(param: str, value: int) -> int:
    """Raises BadRequest."""
    _within(param, value, 0, MAX_LOGPROBS)
    return value


def answer_length(served: ServedModel, prompt: int, asked: int | None, default: int | None, *, name: str) -> int:
    """Tokens to generate at most after `prompt` tokens: as asked, else `default`, else the rest of the context.

    `name`: the field in which the client asked. Raises ContextTooLong, or BadRequest if it asked for none at all.
    """
    limit = context_length(served)
    room = limit - prompt
    if room <= 0:
        raise ContextTooLong(
            f"This model's maximum context length is {limit} tokens. However, your request has {prompt} input tokens. "
            "Please reduce the length of the input messages.",
            param="prompt" if name == "max_tokens" else "messages",
        )
    if asked is None:
        wanted = default if default is not None else room
    elif asked < 1:
        raise BadRequest(f"`{name}` must be at least 1, not {asked}", param=name)
    elif asked > room:
        raise ContextTooLong(
            f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is "
            f"{limit} tokens and your request has {prompt} input tokens ({asked} > {limit} - {prompt}).",
            param=name,
        )
    else:
        wanted = asked
    cap = served.plan.generation.max_tokens
    return min(wanted, room) if cap is None else min(wanted, room, cap)


def _first(asked: float | None, default: float | None, otherwise: float) -> float:
    if asked is not None:
        return asked
    return otherwise if default is None else default


def _within(param: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequest(f"`{param}` must be from {low} to {high}, not {value}", param=param)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise BadRequest("`stop` must not contain an empty string", param="stop")
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"`stop` has {len(stops)} strings; at most {MAX_STOPS} are taken", param="stop")
    return stops


def _logit_bias(bias: Mapping[str, float] | None) -> dict[int, float]:
    if not bias:
        return {}
    result: dict[int, float] = {}
    for token, value in bias.items():
        if not token.isascii() or not token.isdigit():
            raise BadRequest(f'`logit_bias`: "{token}" is not a token id', param="logit_bias")
        result[int(token)] = max(-100.0, min(100.0, value))
    return result
