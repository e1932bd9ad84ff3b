"""HTTP: what people and other programs ask of the master."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import web

from computron.errors import BadRequest, ComputronError
from computron.parameter_service.master.events import (
    CountAsked,
    DrainAsked,
    DropAsked,
    Event,
    Exited,
    MoveAsked,
    QuotaAsked,
)
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.metrics import CONTENT_TYPE, exposition
from computron.parameter_service.master.requests import no_aggregator, no_job
from computron.parameter_service.master.views import aggregator_view, job_view, versions_view

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Body = TypeVar("Body")


class MoveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """blocks: numbers, or "all"."""

    to: str
    blocks: tuple[int, ...] | str = "all"


class CountBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: int


class QuotaBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """memory: bytes; null: what every job may have."""

    memory: int | None


class Server(Protocol):
    master: Master

    def tell(self, event: Event) -> None: ...


def add_routes(app: web.Application, server: Server) -> None:
    routes = Routes(server)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_get("/v1/jobs", routes.jobs)
    app.router.add_get("/v1/jobs/{job}", routes.job)
    app.router.add_delete("/v1/jobs/{job}", routes.drop)
    app.router.add_post("/v1/jobs/{job}/move", routes.move)
    app.router.add_post("/v1/jobs/{job}/quota", routes.quota)
    app.router.add_get("/v1/jobs/{job}/versions", routes.versions)
    app.router.add_get("/v1/aggregators", routes.aggregators)
    app.router.add_post("/v1/aggregators", routes.count)
    app.router.add_post("/v1/aggregators/{aggregator}/drain", routes.drain)
    app.router.add_delete("/v1/aggregators/{aggregator}", routes.forget)
    app.router.add_get("/v1/wanted", routes.wanted)


class Routes:
    def __init__(self, server: Server) -> None:
        self._server = server

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=exposition(self._server.master), headers={"Content-Type": CONTENT_TYPE})

    async def jobs(self, _: web.Request) -> web.Response:
        master = self._server.master
        return _listed([job_view(master, job) for _, job in sorted(master.state.jobs.items())])

    async def job(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request))

    async def drop(self, request: web.Request) -> web.Response:
        self._server.tell(DropAsked(request.match_info["job"]))
        return web.json_response({"deleted": request.match_info["job"]})

    async def move(self, request: web.Request) -> web.Response:
        body = await _body(request, MoveBody)
        if isinstance(body.blocks, str) and body.blocks != "all":
            raise BadRequest('blocks is a list of numbers, or "all"', param="blocks")
        blocks = None if isinstance(body.blocks, str) else body.blocks
        self._server.tell(MoveAsked(request.match_info["job"], blocks, body.to))
        return web.json_response(self._job(request), status=202)

    async def quota(self, request: web.Request) -> web.Response:
        body = await _body(request, QuotaBody)
        if body.memory is not None and body.memory < 0:
            raise BadRequest("memory is a number of bytes, or null", param="memory")
        self._server.tell(QuotaAsked(request.match_info["job"], body.memory))
        return web.json_response({"job": request.match_info["job"], "memory": body.memory})

    async def versions(self, request: web.Request) -> web.Response:
        self._job(request)
        return _listed(versions_view(self._server.master.state.jobs[request.match_info["job"]]))

    async def aggregators(self, _: web.Request) -> web.Response:
        master = self._server.master
        return _listed([aggregator_view(master, known) for _, known in sorted(master.state.aggregators.items())])

    async def count(self, request: web.Request) -> web.Response:
        body = await _body(request, CountBody)
        self._server.tell(CountAsked(body.count))
        return await self.wanted(request)

    async def drain(self, request: web.Request) -> web.Response:
        self._server.tell(DrainAsked(request.match_info["aggregator"]))
        return web.json_response({"draining": request.match_info["aggregator"]}, status=202)

    async def forget(self, request: web.Request) -> web.Response:
        """Somebody knows that it is dead: its machine is gone, and nobody else could say so."""
        name = request.match_info["aggregator"]
        known = self._server.master.state.aggregators.get(name)
        if known is None:
            raise no_aggregator(self._server.master.state, name)
        if known.link is not None:
            raise BadRequest(f"{name} is connected; drain it instead")
        self._server.tell(Exited(name))
        return web.json_response({"deleted": name})

    async def wanted(self, _: web.Request) -> web.Response:
        master = self._server.master
        linked = sum(known.link is not None for known in master.state.aggregators.values())
        return web.json_response({"aggregators": master.scaling.wanted, "connected": linked})

    def _job(self, request: web.Request) -> dict[str, Any]:
        job = self._server.master.state.jobs.get(request.match_info["job"])
        if job is None:
            raise no_job(self._server.master.state, request.match_info["job"])
        return job_view(self._server.master, job)


def error_response(error: ComputronError) -> web.Response:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return web.json_response({"error": body}, status=error.status)


def _listed(data: list[dict[str, Any]]) -> web.Response:
    return web.json_response({"object": "list", "data": data})


async def _body(request: web.Request, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"the body does not fit: {error}") from None
