"""A master that does as a test says, and aggregators, in a thread of this process; workers are real ones."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from aiohttp import WSMsgType, web

from computron.parameter_service import ParameterService
from computron.parameter_service.aggregator.arrivals import Arrivals
from computron.parameter_service.aggregator.job import Job
from computron.parameter_service.aggregator.moves import Moves
from computron.parameter_service.aggregator.orders import Orders
from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.aggregator.saving import Saver
from computron.parameter_service.aggregator.server import Server
from computron.parameter_service.aggregator.steps import Steps
from computron.parameter_service.layout import Layout
from computron.parameter_service.wire.link import Listener, listen
from computron.parameter_service.wire.machine import machine_id
from computron.parameter_service.wire.messages import (
    Address,
    Enlist,
    Host,
    Leave,
    Load,
    Loaded,
    Move,
    Placement,
    Progress,
    Ready,
    ToMaster,
    Unreachable,
    decoder,
    encoder,
)

MEMORY = 1 << 30


class FakeAggregator:
    """An aggregator without its process. reported: what it told the master."""

    def __init__(self, name: str, report: Callable[[str, Any], None]) -> None:
        self.name = name
        self.jobs: dict[str, Job] = {}
        self._report = report

    async def start(self) -> None:
        def report(message: Any) -> None:
            self._report(self.name, message)

        server = Server(self.jobs, report)
        server.steps = self.steps = Steps(self._changed, lambda job, why: None)
        server.pages = self.pages = Pages()
        server.moves = self.moves = Moves(machine_id(), "key", server, self.pages, report, lambda job, why: None)
        server.saver = self.saver = Saver(
            None, report, lambda job, order, why: None, self._free, lambda job, version, step, why: None
        )
        server.orders = self.orders = Orders(
            self.jobs, MEMORY, server.steps, server.moves, server.saver, report, server.arrived, server.leave
        )
        server.arrivals = Arrivals("key", self.jobs, server.orders, self.pages)
        self.server = server
        path = f"\0computron-test-{uuid.uuid4().hex}"
        self.listener: Listener = await listen("127.0.0.1", 0, path, server)
        self.address = Address(self.name, "127.0.0.1", self.listener.port, machine_id(), path)

    def close_links(self) -> None:
        for job in self.jobs.values():
            for worker in list(job.workers.values()):
                worker.link.close()

    def close(self) -> None:
        self.listener.close()
        self.close_links()
        self.moves.close()
        self.pages.close()
        self.steps.close()
        self.saver.close()

    def _changed(self, job: Job, blocks: Any, step: int, commits: Any) -> None:
        self.server.go_on(job, [block.block.index for block in blocks])

    def _free(self, job: Job, blocks: Any) -> None:
        self.server.go_on(job, [block.block.index for block in blocks])


@dataclass
class FakeJob:
    layout: Layout
    enlist: Enlist
    owners: list[str] = field(default_factory=list)
    epoch: int = 0
    sockets: dict[int, web.WebSocketResponse] = field(default_factory=dict)
    began: bool = False
    loads: dict[int, int] = field(default_factory=dict)
    loaded: int = 0


class Cluster:
    """Its methods are called from the test's thread."""

    def __init__(self, aggregators: int) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.aggregators: dict[str, FakeAggregator] = {}
        self.heard: list[Any] = []
        self.url = ""
        self._encoder, self._decoder = encoder(), decoder(ToMaster)
        self._ready: dict[tuple[str, int], asyncio.Event] = {}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start(aggregators))

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(20)

    def service(self, job: str = "job", **settings: Any) -> ParameterService:
        small = {"block_elements": 1024, "rank": 0, "snapshot_every": 0}
        return ParameterService(self.url, job, "secret", **{**small, **settings})

    def move(self, blocks: list[int], to: str, job: str = "job") -> None:
        """Order it; it happens at a step's end."""

        async def move() -> None:
            known = self.jobs[job]
            for name, aggregator in self.aggregators.items():
                mine = tuple(b for b in blocks if known.owners[b] == name and name != to)
                if mine:
                    aggregator.orders.move(Move(job, known.epoch, mine, self.aggregators[to].address))
                    for block in mine:
                        known.owners[block] = to

        self.run(move())

    def reconfigure(
        self, applied: int, job: str = "job", *, source: str = "keep", lost: int = 0, **owners: Any
    ) -> None:
        """A new epoch with the same owners, or all blocks `at` another one."""
        self.run(self._reconfigure(job, applied, source, lost, owners.get("at")))

    def break_links(self, name: str) -> None:
        async def close() -> None:
            self.aggregators[name].close_links()

        self.run(close())

    def disconnect_from_master(self, job: str = "job") -> None:
        async def close() -> None:
            for socket in list(self.jobs[job].sockets.values()):
                await socket.close()

        self.run(close())

    def close(self) -> None:
        async def stop() -> None:
            for aggregator in self.aggregators.values():
                aggregator.close()
            await self._runner.cleanup()

        self.run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, aggregators: int) -> None:
        for number in range(aggregators):
            aggregator = FakeAggregator(f"a{number}", self._reported)
            await aggregator.start()
            self.aggregators[aggregator.name] = aggregator
        app = web.Application()
        app.router.add_get("/v1/link", self._link)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    def _reported(self, name: str, message: Any) -> None:
        self.heard.append(message)
        if isinstance(message, Ready):
            self._ready.setdefault((name, message.epoch), asyncio.Event()).set()

    async def _link(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for raw in socket:
            if raw.type is not WSMsgType.BINARY:
                break
            message = self._decoder.decode(raw.data)
            self.heard.append(message)
            if isinstance(message, Enlist):
                await self._enlist(message, socket)
            elif isinstance(message, Load):
                await self._load(message)
            elif isinstance(message, Leave):
                self.jobs[message.job].sockets.pop(message.rank, None)
        return socket

    async def _enlist(self, message: Enlist, socket: web.WebSocketResponse) -> None:
        spec = message.spec
        job = self.jobs.setdefault(spec.job, FakeJob(Layout(spec.tensors, spec.block_elements), message))
        job.sockets[message.rank or 0] = socket
        if not job.began and len(job.sockets) == spec.workers:
            job.began = True
            names = list(self.aggregators)
            job.owners = [names[block.index % len(names)] for block in job.layout.blocks]
            await self._reconfigure(spec.job, 0, "worker", 0, None)

    async def _load(self, message: Load) -> None:
        """An epoch when all say so, and it is done when one has everything."""
        job = self.jobs[message.job]
        if message.number <= job.loaded:
            return
        if message.ready:
            job.loaded = message.number
            for socket in job.sockets.values():
                await socket.send_bytes(self._encoder.encode(Loaded(message.job, message.number)))
        elif job.loads.get(message.rank) != message.number:
            job.loads[message.rank] = message.number
            if all(job.loads.get(rank) == message.number for rank in job.sockets):
                await self._reconfigure(message.job, message.step, "worker", 0, None, message.number)

    async def _reconfigure(
        self, name: str, applied: int, source: str, lost: int, at: str | None, loads: int = 0
    ) -> None:
        job = self.jobs[name]
        job.epoch += 1
        if at is not None:
            job.owners = [at] * len(job.owners)
        members = tuple(sorted(job.sockets))
        for owner in sorted(set(job.owners)):
            blocks = tuple(i for i, owned in enumerate(job.owners) if owned == owner)
            self.aggregators[owner].orders.host(
                Host(job.enlist.spec, job.enlist.token, job.epoch, members, blocks, applied, source)
            )
            await self._ready.setdefault((owner, job.epoch), asyncio.Event()).wait()
        names = sorted(set(job.owners))
        addresses = tuple(self.aggregators[owner].address for owner in names)
        owners = tuple(names.index(owner) for owner in job.owners)
        for rank, socket in job.sockets.items():
            first = source == "worker" and rank == members[0]
            placement = Placement(
                name, job.epoch, rank, members, owners, addresses, applied, lost, first,
                loads=loads or job.loaded, loading=loads > 0,
            )  # fmt: skip
            await socket.send_bytes(self._encoder.encode(placement))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two aggregators."""
    made = Cluster(2)
    yield made
    made.close()


def told(cluster: Cluster, kind: type[Enlist] | type[Progress] | type[Unreachable] | type[Leave]) -> list[Any]:
    return [message for message in cluster.heard if isinstance(message, kind)]
