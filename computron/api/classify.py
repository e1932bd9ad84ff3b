"""POST /v1/classify: texts or images."""

from __future__ import annotations

import base64
import binascii
import time
from typing import Any

import msgspec
from aiohttp import web

from computron.api.answers import Classification, ClassificationList, LabelProbability, Usage
from computron.api.bodies import answer, read_json
from computron.api.context import LONG_TEXT, Call, Context, read_call
from computron.api.prompts import check_length, read_prompts
from computron.api.protocol import ServedModel
from computron.api.schemas import ClassifyBody
from computron.api.submission import Submission
from computron.errors import BadRequest, ExecutionFailed
from computron.execution.requests import ClassifyJob, ClassOutput

TOP = 5  # labels where the client names no number
_decoder = msgspec.json.Decoder(ClassifyBody)


async def create_classification(context: Context, request: web.BaseRequest) -> web.Response:
    body = await read_json(request, _decoder)
    served = context.model(body.model, "classify")
    call = read_call(context, request, body.priority)
    wanted = "image" if served.plan.takes_images else "input"
    if getattr(body, wanted) is None:
        form = "`image`, as base64 or a data URL" if wanted == "image" else "`input`, as text or token ids"
        raise BadRequest(f"the model `{body.model}` needs {form}", param=wanted)
    top = TOP if body.top_k is None else body.top_k
    if top < 1:
        raise BadRequest(f"`top_k` must be at least 1, not {top}", param="top_k")
    jobs = await (_image_jobs if wanted == "image" else _text_jobs)(context, served, body)
    return await _classify(context, served, body.model, jobs, top, call)


async def _text_jobs(context: Context, served: ServedModel, body: ClassifyBody) -> list[ClassifyJob]:
    prompts = await read_prompts(
        context,
        served,
        body.input or "",
        special=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
        param="input",
    )
    jobs: list[ClassifyJob] = []
    for _, tokens in prompts:
        check_length(served, tokens, "input")
        jobs.append(ClassifyJob(tokens=tokens))
    return jobs


async def _image_jobs(context: Context, served: ServedModel, body: ClassifyBody) -> list[ClassifyJob]:
    images = [body.image] if isinstance(body.image, str) else body.image or []
    if not images:
        raise BadRequest("`image` must not be empty", param="image")
    params = ["image"] if isinstance(body.image, str) else [f"image[{index}]" for index in range(len(images))]

    def prepare() -> list[ClassifyJob]:
        return [ClassifyJob(pixels=_pixels(served, *pair)) for pair in zip(images, params, strict=True)]

    # A small file may hold a large image, so that even one is prepared on a thread.
    return await context.compute(LONG_TEXT, prepare)


def _pixels(served: ServedModel, text: str, param: str) -> Any:
    """The image as the model takes it. Raises BadRequest."""
    if text.startswith(("http://", "https://")):
        raise BadRequest(f"`{param}`: addresses are not fetched; send the image as base64 or a data URL", param=param)
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"`{param}` is not base64: {error}", param=param) from error
    try:
        return served.loaded.pixels(data)
    except BadRequest as error:
        raise BadRequest(f"`{param}`: {error.message}", param=param) from error


async def _classify(
    context: Context, served: ServedModel, model: str, jobs: list[ClassifyJob], top: int, call: Call
) -> web.Response:
    data: list[Classification | None] = [None] * len(jobs)
    async with Submission(context.node, model, jobs, call) as submission:
        async for index, output in submission:
            if not isinstance(output, ClassOutput):
                raise ExecutionFailed(f"the model answered with {type(output).__name__}, not with classes")
            data[index] = _classification(served, index, output, top)
    read = sum(len(job.tokens or ()) for job in jobs)
    result = ClassificationList(
        id=f"classify-{call.request_id}",
        created=int(time.time()),
        model=model,
        data=[item for item in data if item is not None],
        usage=Usage(prompt_tokens=read, total_tokens=read),
    )
    if call.timings:
        result.computron = submission.timings()
    return answer(result)


def _classification(served: ServedModel, index: int, output: ClassOutput, top: int) -> Classification:
    labels, probabilities = served.plan.labels, list(output.probabilities)
    best = sorted(range(len(probabilities)), key=probabilities.__getitem__, reverse=True)[:top]
    return Classification(
        index=index,
        label=labels[best[0]],
        top=[LabelProbability(label=labels[place], probability=probabilities[place]) for place in best],
        probs=probabilities,
        num_classes=len(probabilities),
    )
