"""Bytes over loopback TCP, once as the Parameter Service sends gradients and once through a plain socket."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import uvloop
from _processes import HOST

from computron.parameter_service.aggregator.staging import PushedStaging
from computron.parameter_service.layout import Layout, TensorSpec
from computron.parameter_service.wire.link import Link, connect, listen
from computron.parameter_service.wire.messages import Address, Flush, JobSpec, Push, Pushed


def job_of(elements: int) -> JobSpec:
    return JobSpec("benchmark", (TensorSpec("all", (elements,), "float32", 0),), "sgd", 1 << 20)


class _Sink:
    """Stages what is pushed, as an aggregator does."""

    def __init__(self, elements: int) -> None:
        spec = job_of(elements)
        self._layout = Layout(spec.tensors, spec.block_elements)
        self._staging = PushedStaging(spec)

    def destination(self, link: Link, message: Any, size: int) -> memoryview:
        return self._staging.destination(self._layout.blocks[message.block])

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        if isinstance(message, Push):
            self._staging.came(message.block, message.step)
        else:
            link.send(Pushed(message.job, message.step))

    def lost(self, link: Link, reason: str) -> None: ...


def _serve_links(elements: int, told: Connection) -> None:
    async def main() -> None:
        listener = await listen(HOST, 0, f"\0computron-benchmark-{uuid.uuid4().hex}", _Sink(elements))
        told.send(listener.port)
        await asyncio.Event().wait()

    uvloop.run(main())


def _serve_plain(elements: int, told: Connection) -> None:
    into = memoryview(bytearray(elements * 4))
    with socket.create_server((HOST, 0)) as server:
        told.send(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            while True:
                read = 0
                while read < len(into):
                    count = connection.recv_into(into[read:])
                    if not count:
                        return
                    read += count
                connection.sendall(b"!")


class _Source:
    def __init__(self) -> None:
        self._heard = asyncio.Event()
        self._lost = ""

    async def answer(self) -> None:
        """Raises RuntimeError if there will be none."""
        await self._heard.wait()
        self._heard.clear()
        if self._lost:
            raise RuntimeError(f"the server's link ended: {self._lost}")

    def destination(self, link: Link, message: Any, size: int) -> None: ...

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        self._heard.set()

    def lost(self, link: Link, reason: str) -> None:
        self._lost = reason
        self._heard.set()


async def _through_links(port: int, elements: int, rounds: int) -> list[float]:
    layout = Layout(job_of(elements).tensors, 1 << 20)
    source = _Source()
    link = await connect(Address("sink", HOST, port, "", ""), source, machine="elsewhere")
    gradient = torch.ones(layout.elements)
    taken = []
    for step in range(1, rounds + 1):
        start = time.perf_counter()
        for block in layout.blocks:
            part: Any = gradient[block.start : block.start + block.elements].view(torch.uint8).numpy()
            link.send(Push("benchmark", 1, step, block.index), payload=memoryview(part))
        link.send(Flush("benchmark", step))
        await source.answer()
        taken.append(time.perf_counter() - start)
    link.close()
    return taken


def _through_plain(port: int, elements: int, rounds: int) -> list[float]:
    data = memoryview(bytearray(b"1") * (elements * 4))
    taken = []
    with socket.create_connection((HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            start = time.perf_counter()
            connection.sendall(data)
            if not connection.recv(1):
                raise RuntimeError("the server ended the connection")
            taken.append(time.perf_counter() - start)
    return taken


def _with(serve: Callable[[int, Connection], None], elements: int, use: Callable[[int], list[float]]) -> list[float]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(elements, there), daemon=True)
    process.start()
    there.close()  # the process has its own: when that ends, nothing more can come
    try:
        return use(here.recv())
    except EOFError as error:
        raise RuntimeError("the server's process ended before it listened") from error
    finally:
        process.terminate()
        process.join()


def seconds_over_tcp(elements: int, rounds: int) -> tuple[list[float], list[float]]:
    """Of fp32 elements to another process, until it has answered: through links, and through a plain socket."""
    links = _with(_serve_links, elements, lambda port: uvloop.run(_through_links(port, elements, rounds)))
    plain = _with(_serve_plain, elements, lambda port: _through_plain(port, elements, rounds))
    return links, plain
