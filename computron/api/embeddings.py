"""POST /v1/embeddings"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import msgspec
import numpy
from aiohttp import web

from computron.api.answers import Embedding, EmbeddingList, Usage
from computron.api.bodies import answer, read_json
from computron.api.context import Context, read_call
from computron.api.prompts import check_length, read_prompts
from computron.api.schemas import EmbeddingBody
from computron.api.submission import Submission
from computron.errors import BadRequest, ExecutionFailed
from computron.execution.requests import EmbeddingOutput, EmbedJob

_decoder = msgspec.json.Decoder(EmbeddingBody)


async def create_embeddings(context: Context, request: web.BaseRequest) -> web.Response:
    body = await read_json(request, _decoder)
    served = context.model(body.model, "embed")
    call = read_call(context, request, body.priority)
    if body.dimensions is not None:
        raise BadRequest(
            f"the model `{body.model}` has embeddings of one size; `dimensions` cannot be chosen", param="dimensions"
        )
    prompts = await read_prompts(
        context,
        served,
        body.input,
        special=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
        param="input",
    )
    jobs: list[EmbedJob] = []
    for _, tokens in prompts:
        check_length(served, tokens, "input")
        jobs.append(EmbedJob(tokens))
    embeddings: list[Sequence[float]] = [()] * len(jobs)
    async with Submission(context.node, body.model, jobs, call) as submission:
        async for index, output in submission:
            if not isinstance(output, EmbeddingOutput):
                raise ExecutionFailed(f"the model answered with {type(output).__name__}, not an embedding")
            embeddings[index] = output.embedding
    write = _base64 if body.encoding_format == "base64" else _floats
    read = sum(len(job.tokens) for job in jobs)
    result = EmbeddingList(
        model=body.model,
        data=[Embedding(index=index, embedding=write(embedding)) for index, embedding in enumerate(embeddings)],
        usage=Usage(prompt_tokens=read, total_tokens=read),
    )
    if call.timings:
        result.computron = submission.timings()
    return answer(result)


def _floats(embedding: Sequence[float]) -> list[float]:
    return list(embedding)


def _base64(embedding: Sequence[float]) -> str:
    return base64.b64encode(numpy.asarray(embedding, dtype="<f4").tobytes()).decode()
