"""The routes."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from aiohttp import web

from computron.api import chat, classify, completions, embeddings, infer, models, status, tokens
from computron.api.context import Context
from computron.api.middleware import edge
from computron.api.protocol import ServingNode
from computron.config import ServerConfig
from computron.metrics import Metrics

Route = Callable[[Context, web.Request], Awaitable[web.StreamResponse]]

ROUTES: tuple[tuple[str, str, Route], ...] = (
    ("POST", "/v1/completions", completions.create_completion),
    ("POST", "/v1/chat/completions", chat.create_chat_completion),
    ("POST", "/v1/embeddings", embeddings.create_embeddings),
    ("POST", "/v1/classify", classify.create_classification),
    ("POST", "/v1/models/{model:.+}/infer", infer.infer),
    ("GET", "/v1/models", models.list_models),
    ("POST", "/v1/models/{model:.+}/load", models.load_model),
    ("POST", "/v1/models/{model:.+}/unload", models.unload_model),
    ("GET", "/v1/models/{model:.+}", models.show_model),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/health", status.health),
    ("GET", "/health/ready", status.ready),
    ("GET", "/metrics", status.metrics),
    ("GET", "/version", status.version),
)


def make_app(node: ServingNode, server: ServerConfig, metrics: Metrics) -> web.Application:
    """The application that serves this node. `metrics`: what the node also counts in."""
    context = Context(node, server, metrics)
    app = web.Application(middlewares=[edge(context)], client_max_size=server.max_body)
    for method, path, handler in ROUTES:
        app.router.add_route(method, path, functools.partial(handler, context))
    metrics.watch(node.snapshot)

    async def close_context(app: web.Application) -> None:
        context.close()

    app.on_cleanup.append(close_context)
    return app
