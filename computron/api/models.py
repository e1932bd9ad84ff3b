"""GET /v1/models, GET /v1/models/{id}, POST /v1/models/{id}/load and /unload"""

from __future__ import annotations

from aiohttp import web

from computron.api.answers import Model, ModelList
from computron.api.bodies import answer
from computron.api.context import Context
from computron.api.protocol import context_length
from computron.errors import ModelNotFound
from computron.node.snapshot import ModelSnapshot


async def list_models(context: Context, request: web.BaseRequest) -> web.Response:
    return answer(ModelList(data=[_model(context, figures) for figures in context.node.snapshot().models]))


async def show_model(context: Context, request: web.BaseRequest, model: str) -> web.Response:
    context.model(model, None)
    return answer(_shown(context, model))


async def load_model(context: Context, request: web.BaseRequest, model: str) -> web.Response:
    """Order it, and tell the state it is in now: 202, since it becomes resident when nothing more urgent is done."""
    context.model(model, None)
    context.node.load(model)
    return answer(_shown(context, model), status=202)


async def unload_model(context: Context, request: web.BaseRequest, model: str) -> web.Response:
    """Order it, and tell the state it is in now: 202, since it leaves the device when it is idle."""
    context.model(model, None)
    context.node.unload(model)
    return answer(_shown(context, model), status=202)


def _shown(context: Context, model: str) -> Model:
    for figures in context.node.snapshot().models:
        if figures.model == model:
            return _model(context, figures)
    raise ModelNotFound(f"The model `{model}` does not exist.", param="model")


def _model(context: Context, figures: ModelSnapshot) -> Model:
    served = context.node.model(figures.model)
    plan = served.plan
    return Model(
        id=figures.model,
        created=context.started,
        root=plan.config.source or plan.config.factory or figures.model,
        max_model_len=context_length(served) or None,
        task=figures.task,
        state=figures.state,
        bytes=figures.nbytes,
        pages=figures.pages,
        segments=figures.segments,
        cache_bytes_per_token=figures.cache_bytes_per_token,
        overlaps=figures.overlaps,
        max_batch_size=plan.config.max_batch_size,
        resident_ratio=figures.resident_ratio,
        pinned=plan.config.pinned,
        queue_depth=figures.queue_depth,
        running=figures.running,
    )
