"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import functools

import msgspec
from aiohttp import web

from computron.api.answers import Tokens
from computron.api.bodies import answer, read_json
from computron.api.context import Context
from computron.api.prompts import render_chat
from computron.api.protocol import ServedModel, context_length
from computron.api.schemas import DetokenizeBody, TokenizeBody
from computron.errors import BadRequest

DECODED_ALONE = 20  # characters that are encoded in the time in which one token is decoded by itself
_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


async def tokenize(context: Context, request: web.BaseRequest) -> web.Response:
    body = await read_json(request, _tokenize_decoder)
    served = _text_model(context, body.model)
    tokens = await _tokens(context, served, body)
    result = Tokens(count=len(tokens), max_model_len=context_length(served), tokens=tokens)
    if body.return_token_strs:
        result.token_strs = await context.compute(len(tokens) * DECODED_ALONE, lambda: _each_decoded(served, tokens))
    return answer(result)


async def detokenize(context: Context, request: web.BaseRequest) -> web.Response:
    body = await read_json(request, _detokenize_decoder)
    served = _text_model(context, body.model)
    decode = functools.partial(served.loaded.decode, body.tokens, skip_special_tokens=False)
    return answer({"prompt": await context.compute(len(body.tokens), decode)})


def _each_decoded(served: ServedModel, tokens: list[int]) -> list[str]:
    return [served.loaded.decode([token], skip_special_tokens=False) for token in tokens]


async def _tokens(context: Context, served: ServedModel, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("either `prompt` or `messages` is needed", param="prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        encode = functools.partial(served.loaded.encode, body.prompt, add_special_tokens=special)
        return await context.compute(len(body.prompt), encode)
    arguments = dict(body.chat_template_kwargs or {})
    if body.tools:
        arguments["tools"] = body.tools
    rendered = await render_chat(
        context,
        served,
        body.messages or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        special=bool(body.add_special_tokens),
        template_arguments=arguments,
    )
    return list(rendered)


def _text_model(context: Context, model: str) -> ServedModel:
    served = context.model(model, None)
    if not served.plan.max_model_len:
        raise BadRequest(f"the model `{model}` has no tokenizer", param="model")
    return served
