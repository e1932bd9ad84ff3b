"""GET /health, /health/ready, /metrics and /version: for those who watch the server."""

from __future__ import annotations

from aiohttp import web

from computron.api.bodies import answer
from computron.api.context import Context
from computron.api.version import installed_version
from computron.metrics import CONTENT_TYPE
from computron.node.snapshot import NodeState


async def health(context: Context, request: web.BaseRequest) -> web.Response:
    """200 as long as restarting would not help; 503 once the device has failed."""
    snapshot = context.node.snapshot()
    body = {"status": snapshot.state.value, "reason": snapshot.reason}
    return answer(body, status=503 if snapshot.state is NodeState.FAILED else 200)


async def ready(context: Context, request: web.BaseRequest) -> web.Response:
    """200 if requests are taken now."""
    snapshot = context.node.snapshot()
    body = {"status": snapshot.state.value, "reason": snapshot.reason}
    return answer(body, status=200 if context.node.ready else 503)


async def metrics(context: Context, request: web.BaseRequest) -> web.Response:
    return web.Response(body=context.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


async def version(context: Context, request: web.BaseRequest) -> web.Response:
    return answer({"version": installed_version()})
