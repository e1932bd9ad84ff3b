"""An aggregator's process, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

from computron.parameter_service.aggregator.arrivals import Arrivals
from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.job import Job, versions_of
from computron.parameter_service.aggregator.master_link import MasterLink
from computron.parameter_service.aggregator.moves import Moves
from computron.parameter_service.aggregator.orders import Orders
from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.aggregator.saving import Saver
from computron.parameter_service.aggregator.server import Server
from computron.parameter_service.aggregator.steps import Steps
from computron.parameter_service.wire.link import listen
from computron.parameter_service.wire.machine import machine_id
from computron.parameter_service.wire.messages import (
    NO_FOLDER,
    Address,
    BlockState,
    Complete,
    Drop,
    Failed,
    HeldCommit,
    Hold,
    Host,
    HostedJob,
    JobUsage,
    Keep,
    Kept,
    Move,
    Register,
    Registered,
    Stop,
    Usage,
)

log = logging.getLogger(__name__)

REPORT_EVERY = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class AggregatorSettings:
    """master: its URL. host, port: where workers of other machines connect; 0 for any port.

    memory: bytes of blocks, and of gradients that are pushed for them. snapshots: folder of snapshots and versions, the
    same for all aggregators and the master. key: by which the master and aggregators know each other. api_key: of the
    service, where it has one.
    """

    master: str
    host: str
    port: int
    memory: int
    key: str
    snapshots: Path | None = None
    identity: str | None = None
    api_key: str | None = None


class Aggregator:
    def __init__(self, settings: AggregatorSettings) -> None:
        self._settings = settings
        self._identity = settings.identity or f"aggregator-{uuid.uuid4().hex[:8]}"
        self._jobs: dict[str, Job] = {}
        self._stopped = asyncio.Event()
        self._told_to_stop = asyncio.Event()
        self._told = time.monotonic()
        self._busy = 0.0
        self._cpu = time.process_time()

    async def run(self) -> None:
        """Until the master or a signal says that it is to stop. Raises OSError if it cannot listen."""
        settings = self._settings
        key = settings.key
        server = Server(self._jobs, self._report)
        server.steps = steps = Steps(self._changed, self._step_failed)
        server.pages = pages = Pages()
        server.moves = moves = Moves(machine_id(), key, server, pages, self._report, self._move_failed)
        server.saver = saver = Saver(
            settings.snapshots, self._report, self._order_failed, self._free, self._unpublished
        )
        server.orders = orders = Orders(
            self._jobs, settings.memory, steps, moves, saver, self._report, server.arrived, server.leave
        )
        server.arrivals = Arrivals(key, self._jobs, orders, pages)
        self._server, self._orders, self._steps, self._saver = server, orders, steps, saver
        try:
            await self._serve(server)
        finally:
            moves.close()
            pages.close()
            steps.close()
            saver.close()

    async def _serve(self, server: Server) -> None:
        settings = self._settings
        path = f"\0computron-{uuid.uuid4().hex}"
        listener = await listen(settings.host, settings.port, path, server)
        self._address = Address(self._identity, settings.host, listener.port, machine_id(), path)
        self._master = MasterLink(settings.master, settings.api_key, self._register, self._received, self._master_away)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopped.set)
        tasks: list[asyncio.Task[Any]]
        tasks = [asyncio.create_task(self._master.run()), asyncio.create_task(self._report_usage())]
        tasks += [asyncio.create_task(self._stopped.wait()), asyncio.create_task(self._leave())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            listener.close()

    def _received(self, message: Any) -> None:
        match message:
            case Host():
                self._orders.host(message)
            case Hold():
                self._orders.hold(message)
            case Complete():
                self._orders.complete(message)
            case Move():
                self._orders.move(message)
            case Keep():
                self._orders.keep(message)
            case Drop():
                self._orders.drop(message)
            case Kept():
                if message.step is not None:
                    self._saver.kept(message.job, message.step)
                for job in self._orders.kept(message):
                    self._server.go_on(job, list(job.blocks))
            case Registered():
                for name in message.drop:
                    self._orders.drop(Drop(name))
                self._saver.tell_again()
                for job in self._jobs.values():
                    if job.trouble:
                        self._tell_failed(job, "save", job.trouble)
            case Stop():
                self._told_to_stop.set()
            case _:
                log.error("%s is not for aggregators", type(message).__name__)

    def _changed(self, job: Job, blocks: list[HeldBlock], step: int, commits: Sequence[HeldCommit]) -> None:
        if job.wants_snapshot(step) and not job.held:  # else this may be no step of the epoch that has begun
            self._saver.save(job, blocks, step)
        for version in versions_of(commits):
            self._saver.save(job, blocks, step, version)
        self._server.go_on(job, [block.block.index for block in blocks])

    async def _leave(self) -> None:
        """When the master says so, all that was to be in files is there, and the master has been told."""
        told = False
        while not told:
            await self._told_to_stop.wait()
            self._told_to_stop.clear()
            await self._saver.written()
            told = await self._master.flush()  # if not, the master says it again

    def _free(self, job: Job, blocks: Sequence[HeldBlock]) -> None:
        self._server.go_on(job, [block.block.index for block in blocks])

    def _report(self, message: Any) -> None:
        self._master.send(message)

    def _move_failed(self, job: Job, reason: str) -> None:
        self._order_failed(job, "move", reason)

    def _step_failed(self, job: Job, reason: str) -> None:
        self._order_failed(job, "step", reason)

    def _order_failed(self, job: Job, order: str, reason: str) -> None:
        known = reason == NO_FOLDER  # to whoever started it, whom the master tells what follows from that
        log.log(logging.INFO if known else logging.ERROR, "job %s: %s: %s", job.spec.job, order, reason)
        self._tell_failed(job, order, reason)
        if order == "save":
            job.kept, job.trouble = None, reason
            self._server.go_on(job, list(job.blocks))

    def _unpublished(self, job: Job, version: str, step: int, reason: str, path: Path | None, history: int) -> None:
        log.warning("job %s: version %s: %s", job.spec.job, version, reason)
        file = "" if path is None else str(path)
        self._report(Failed(job.spec.job, job.epoch, "publish", reason, step, version, file, history))

    def _tell_failed(self, job: Job, order: str, reason: str) -> None:
        step = max((block.applied for block in job.blocks.values()), default=0)
        self._report(Failed(job.spec.job, job.epoch, order, reason, step))

    def _master_away(self) -> None:
        for job in self._jobs.values():
            if not job.master_away:
                job.master_away = True
                self._server.go_on(job, list(job.blocks))

    def _register(self) -> Register:
        jobs = tuple(
            HostedJob(
                job.spec,
                job.token,
                job.epoch,
                job.members,
                tuple(BlockState(b.block.index, b.applied) for b in job.blocks.values() if b.complete),
                job.held,
            )
            for job in self._jobs.values()
        )
        return Register(self._address, self._settings.key, os.getpid(), self._settings.memory, jobs)

    async def _report_usage(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY)
            self._report(self._usage())

    def _usage(self) -> Usage:
        now, busy, cpu = time.monotonic(), self._steps.compute.busy, time.process_time()
        seconds, self._told = now - self._told, now
        jobs = []
        for job in self._jobs.values():
            memory = sum(block.segment.nbytes for block in job.blocks.values())
            jobs.append(
                JobUsage(
                    job.spec.job,
                    job.counters.cpu,
                    job.counters.steps,
                    job.counters.late,
                    memory,
                    job.counters.network,
                    tuple((index, job.block_seconds[index]) for index in job.blocks if index in job.block_seconds),
                    self._steps.compute.behind(job) if job.counters.steps else 0.0,  # else with the next step's
                )
            )
            job.counters = type(job.counters)()
        usage = Usage(self._identity, seconds, busy - self._busy, cpu - self._cpu, self._orders.room.used, tuple(jobs))
        self._busy, self._cpu = busy, cpu
        return usage


def run(settings: AggregatorSettings) -> None:
    """The whole life of an aggregator. Raises OSError if it cannot listen."""
    torch.set_num_threads(1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def main() -> None:
        await Aggregator(settings).run()

    uvloop.run(main())
