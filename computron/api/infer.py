"""POST /v1/models/{id}/infer: custom models, whose body only their batch manager understands."""

from __future__ import annotations

import functools
import time

import msgspec
from aiohttp import web

from computron.api.answers import Inference
from computron.api.bodies import answer, read_json
from computron.api.context import Context, read_call
from computron.api.submission import Submission
from computron.errors import ExecutionFailed
from computron.execution.requests import CustomJob, CustomOutput

_decoder = msgspec.json.Decoder()


async def infer(context: Context, request: web.BaseRequest, model: str) -> web.Response:
    served = context.model(model, "custom")
    payload = await read_json(request, _decoder)
    call = read_call(context, request)
    parse = functools.partial(served.loaded.batch_manager.parse, payload)
    job = CustomJob(await context.compute(request.content_length or 0, parse))
    async with Submission(context.node, model, (job,), call) as submission:
        _, output = await anext(submission)
    if not isinstance(output, CustomOutput):
        raise ExecutionFailed(f"the model answered with {type(output).__name__}, not with a value")
    result = Inference(id=f"infer-{call.request_id}", created=int(time.time()), model=model, output=output.value)
    if call.timings:
        result.computron = submission.timings()
    try:
        return answer(result)
    except (TypeError, NotImplementedError, ValueError) as error:
        raise ExecutionFailed(f"the model's answer cannot be written as JSON: {error}") from error
