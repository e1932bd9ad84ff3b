"""The routes."""

from __future__ import annotations

from computron.api import chat, classify, completions, embeddings, infer, models, status, tokens
from computron.api.context import Context
from computron.api.edge import Edge
from computron.api.protocol import ServingNode
from computron.api.routing import Handler, Router
from computron.config import ServerConfig
from computron.metrics import Metrics

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/completions", completions.create_completion),
    ("POST", "/v1/chat/completions", chat.create_chat_completion),
    ("POST", "/v1/embeddings", embeddings.create_embeddings),
    ("POST", "/v1/classify", classify.create_classification),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model}", models.show_model),
    ("POST", "/v1/models/{model}/infer", infer.infer),
    ("POST", "/v1/models/{model}/load", models.load_model),
    ("POST", "/v1/models/{model}/unload", models.unload_model),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/health", status.health),
    ("GET", "/health/ready", status.ready),
    ("GET", "/metrics", status.metrics),
    ("GET", "/version", status.version),
)


def make_app(node: ServingNode, server: ServerConfig, metrics: Metrics) -> Edge:
    """What answers requests for this node. `metrics`: what the node also counts in."""
    metrics.watch(node.snapshot)
    return Edge(Context(node, server, metrics), Router(ROUTES))
