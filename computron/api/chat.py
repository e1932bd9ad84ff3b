"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from computron.api.answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    Usage,
)
from computron.api.bodies import answer, read_json
from computron.api.choices import Choice, text_output, usage
from computron.api.context import Context, read_call
from computron.api.logprobs import chat_logprobs, prompt_logprobs
from computron.api.prompts import cut_prompt, render_chat
from computron.api.protocol import ServedModel
from computron.api.sampling import answer_length, check_logprobs, check_refused, choices, sampling_params, seeded
from computron.api.schemas import ChatBody
from computron.api.sse import stream
from computron.api.submission import Submission
from computron.errors import BadRequest
from computron.execution.requests import GenerateJob, Output, SamplingParams, TokenLogprob

_decoder = msgspec.json.Decoder(ChatBody)


async def create_chat_completion(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    body = await read_json(request, _decoder)
    served = context.model(body.model, "generate")
    _check(body)
    call = read_call(context, request, body.priority)
    rendered = await render_chat(
        context,
        served,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        special=bool(body.add_special_tokens),
        template_arguments=_template_arguments(body),
    )
    prompt = cut_prompt(served, rendered, body.truncate_prompt_tokens, "messages")
    params = _sampling(body, served, len(prompt))
    jobs = [GenerateJob(prompt, seeded(params, choice)) for choice in range(choices(body))]
    writer = ChatWriter(body, f"chatcmpl-{call.request_id}", prompt, len(jobs))
    async with Submission(context.node, body.model, jobs, call) as submission:
        if body.stream:
            return await stream(request, submission, writer, context.server.keep_alive_interval)
        async for index, output in submission:
            writer.add(index, output)
        completion = writer.completion()
        if call.timings:
            completion.computron = submission.timings()
        return answer(completion)


def _check(body: ChatBody) -> None:
    check_refused(body)
    if body.chat_template is not None:
        raise BadRequest(
            "`chat_template` is not taken from requests; it is set in the server's configuration",
            param="chat_template",
        )
    if body.tools and body.tool_choice != "none":
        raise BadRequest(
            'tool calls are not parsed by this server; `tool_choice`: "none" shows the tools to the model '
            "and returns its answer as text",
            param="tool_choice" if body.tool_choice is not None else "tools",
        )
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise BadRequest("`top_logprobs` can only be given with `logprobs`: true", param="top_logprobs")
        check_logprobs("top_logprobs", body.top_logprobs)


def _template_arguments(body: ChatBody) -> dict[str, Any]:
    arguments = dict(body.chat_template_kwargs or {})
    if body.tools:
        arguments["tools"] = body.tools
    if body.documents:
        arguments["documents"] = body.documents
    return arguments


def _sampling(body: ChatBody, served: ServedModel, prompt: int) -> SamplingParams:
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    length = answer_length(served, prompt, getattr(body, name), None, name=name)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_params(body, served.plan.generation, length, logprobs=logprobs)


class ChatWriter:
    """The answer, whole or chunk by chunk."""

    def __init__(self, body: ChatBody, answer_id: str, prompt: Sequence[int], n: int) -> None:
        self._body = body
        self._id = answer_id
        self._created = int(time.time())
        self._prompt = prompt
        self._choices = [Choice(prompt) for _ in range(n)]
        self._greeted = [False] * n
        options = body.stream_options
        self._usage_at_end = options is not None and bool(options.include_usage)
        self._usage_always = self._usage_at_end and options is not None and bool(options.continuous_usage_stats)

    def add(self, index: int, output: Output) -> None:
        """Gather what a whole answer needs."""
        self._choices[index].add(text_output(output))

    def completion(self) -> ChatCompletion:
        given = self._choices[0].prompt_logprobs
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            choices=[self._whole_choice(index, choice) for index, choice in enumerate(self._choices)],
            usage=usage([self._prompt], self._choices),
            prompt_logprobs=UNSET if given is None else prompt_logprobs(given),
        )

    def chunks(self, index: int, output: Output) -> Iterator[ChatChunk]:
        text = text_output(output)
        choice = self._choices[index]
        if not self._greeted[index]:
            self._greeted[index] = True
            yield self._chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))], choice)
        choice.progress(text)
        if not (text.tokens or text.text or text.finish_reason):
            return
        piece = ChunkChoice(
            index=index,
            delta=Delta(content=text.text),
            logprobs=self._logprobs(text.logprobs),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        yield self._chunk([piece], choice)

    def last_chunks(self) -> Iterator[ChatChunk]:
        if self._usage_at_end:
            chunk = self._chunk([], None)
            chunk.usage = usage([self._prompt], self._choices)
            yield chunk

    def _whole_choice(self, index: int, choice: Choice) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content="".join(choice.text)),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(entries, bool(self._body.return_tokens_as_token_ids))

    def _chunk(self, pieces: list[ChunkChoice], choice: Choice | None) -> ChatChunk:
        until_now: Usage | UnsetType | None = None if self._usage_at_end else UNSET
        if self._usage_always and choice is not None:
            until_now = usage([self._prompt], [choice])
        return ChatChunk(id=self._id, created=self._created, model=self._body.model, choices=pieces, usage=until_now)
