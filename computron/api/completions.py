"""POST /v1/completions"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from computron.api.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from computron.api.bodies import answer, read_json
from computron.api.choices import Choice, text_output, usage
from computron.api.context import Context, read_call
from computron.api.logprobs import CompletionLogprobsWriter, prompt_logprobs
from computron.api.prompts import ENCODED_MEANWHILE, Prompt, read_prompts
from computron.api.protocol import ServedModel
from computron.api.sampling import answer_length, check_logprobs, check_refused, choices, sampling_params, seeded
from computron.api.schemas import CompletionBody
from computron.api.sse import stream
from computron.api.submission import Submission
from computron.errors import BadRequest
from computron.execution.requests import GenerateJob, Output, SamplingParams, TokenLogprob

MAX_TOKENS = 16  # where the client says nothing, as OpenAI
_decoder = msgspec.json.Decoder(CompletionBody)


async def create_completion(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    body = await read_json(request, _decoder)
    served = context.model(body.model, "generate")
    _check(body)
    call = read_call(context, request, body.priority)
    read = await read_prompts(
        context,
        served,
        body.prompt,
        special=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
        param="prompt",
    )
    prompts = [tokens for _, tokens in read]
    sampling = _sampling(body, served, prompts)
    echoes = await _echoes(context, served, body, read)
    n = choices(body)
    jobs = [
        GenerateJob(prompt, seeded(params, choice))
        for prompt, params in zip(prompts, sampling, strict=True)
        for choice in range(n)
    ]
    writer = CompletionWriter(body, served, f"cmpl-{call.request_id}", prompts, echoes, n)
    async with Submission(context.node, body.model, jobs, call) as submission:
        if body.stream:
            return await stream(request, submission, writer, context.server.keep_alive_interval)
        async for index, output in submission:
            writer.add(index, output)
        completion = writer.completion()
        if call.timings:
            completion.computron = submission.timings()
        return answer(completion)


def _check(body: CompletionBody) -> None:
    check_refused(body)
    if body.suffix:
        raise BadRequest("`suffix` is not offered", param="suffix")
    if body.best_of is not None and body.best_of != choices(body):
        raise BadRequest("`best_of` is only offered where it equals `n`", param="best_of")
    if body.logprobs is not None:
        check_logprobs("logprobs", body.logprobs)


def _sampling(body: CompletionBody, served: ServedModel, prompts: Sequence[Sequence[int]]) -> list[SamplingParams]:
    """For each prompt; made once for all prompts of one length."""
    asked, default = (None, MAX_TOKENS) if body.max_tokens is UNSET else (body.max_tokens, None)
    if body.echo and asked == 0:
        asked = 1  # a step is needed to read the prompt; its token is not shown
    made: dict[int, SamplingParams] = {}
    for size in map(len, prompts):
        if size not in made:
            length = answer_length(served, size, asked, default, name="max_tokens")
            made[size] = sampling_params(
                body, served.plan.generation, length, logprobs=body.logprobs, echo=bool(body.echo)
            )
    return [made[len(prompt)] for prompt in prompts]


async def _echoes(
    context: Context, served: ServedModel, body: CompletionBody, read: Sequence[tuple[Prompt, tuple[int, ...]]]
) -> list[str]:
    """What each answer begins with: the text as it was given, or that of the tokens that were kept."""
    if not body.echo:
        return [""] * len(read)
    whole = body.truncate_prompt_tokens is None

    def decode() -> list[str]:
        return [given if whole and isinstance(given, str) else served.loaded.decode(tokens) for given, tokens in read]

    return await context.compute(sum(ENCODED_MEANWHILE + len(tokens) for _, tokens in read), decode)


class CompletionWriter:
    """The answer, whole or chunk by chunk. Choice i answers prompt i // n."""

    def __init__(
        self,
        body: CompletionBody,
        served: ServedModel,
        answer_id: str,
        prompts: list[tuple[int, ...]],
        echoes: list[str],
        n: int,
    ) -> None:
        self._body = body
        self._loaded = served.loaded
        self._id = answer_id
        self._created = int(time.time())
        self._prompts = prompts
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._echo_only = bool(body.echo) and body.max_tokens == 0
        self._choices = [Choice(prompt) for prompt in prompts for _ in range(n)]
        self._logprobs = [CompletionLogprobsWriter(bool(body.return_tokens_as_token_ids)) for _ in self._choices]
        options = body.stream_options
        self._usage_at_end = options is not None and bool(options.include_usage)
        self._usage_always = self._usage_at_end and options is not None and bool(options.continuous_usage_stats)

    def add(self, index: int, output: Output) -> None:
        """Gather what a whole answer needs."""
        self._choices[index].add(text_output(output))

    def completion(self) -> Completion:
        choices = [self._whole_choice(index) for index in range(len(self._choices))]
        return self._completion(choices, self._usage(self._prompts, self._choices))

    def chunks(self, index: int, output: Output) -> Iterator[Completion]:
        text = text_output(output)
        choice = self._choices[index]
        first = choice.tokens == 0
        choice.progress(text)
        if not (text.tokens or text.text or text.finish_reason):
            return
        chunk = CompletionChoice(
            index=index,
            text=self._text(index, text.text, first),
            logprobs=self._write_logprobs(index, text.logprobs, first),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=text.tokens if self._body.return_token_ids else UNSET,
        )
        usage_until_now = self._usage([choice.prompt], [choice]) if self._usage_always else None
        yield self._completion([chunk], usage_until_now if self._usage_at_end else UNSET)

    def last_chunks(self) -> Iterator[Completion]:
        if self._usage_at_end:
            yield self._completion([], self._usage(self._prompts, self._choices))

    def _whole_choice(self, index: int) -> CompletionChoice:
        choice = self._choices[index]
        asked = self._body.prompt_logprobs is not None and choice.prompt_logprobs is not None
        return CompletionChoice(
            index=index,
            text=self._text(index, "".join(choice.text), first=True),
            logprobs=self._write_logprobs(index, choice.logprobs, first=True),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_logprobs=prompt_logprobs(choice.prompt_logprobs or ()) if asked else UNSET,
            token_ids=choice.token_ids if self._body.return_token_ids else UNSET,
        )

    def _text(self, index: int, generated: str, first: bool) -> str:
        return (self._echoes[index] if first else "") + ("" if self._echo_only else generated)

    def _write_logprobs(self, index: int, generated: Sequence[TokenLogprob], first: bool) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        entries: list[TokenLogprob | None] = [] if self._echo_only else list(generated)
        prompt = self._choices[index].prompt
        if not (self._body.echo and first):
            return self._logprobs[index].write(entries)
        opening = prompt[0], self._loaded.decode(prompt[:1], skip_special_tokens=False)
        return self._logprobs[index].write([*(self._choices[index].prompt_logprobs or ()), *entries], opening)

    def _usage(self, prompts: Sequence[Sequence[int]], choices: list[Choice]) -> Usage:
        if self._echo_only:
            return usage(prompts, ())
        return usage(prompts, choices)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage)
