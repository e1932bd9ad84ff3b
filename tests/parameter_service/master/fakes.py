"""Aggregators and agents of the tests: they speak the protocol over real websockets and hold no parameters."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import aiohttp

from computron.parameter_service.layout import Layout, TensorSpec
from computron.parameter_service.wire import messages
from computron.parameter_service.wire.messages import (
    Address,
    BlockState,
    Complete,
    Drop,
    Enlist,
    Held,
    HeldCommit,
    Hold,
    Host,
    HostedJob,
    JobSpec,
    Move,
    MovedOut,
    Placement,
    Ready,
    Register,
    Stop,
)

BLOCK = 1024  # elements
KEY = "the service's key"


def job_spec(job: str = "lm", *, blocks: int = 4, **fields: Any) -> JobSpec:
    """A job of so many blocks, one tensor each."""
    tensors = tuple(TensorSpec(f"w{number}", (BLOCK,), "float32", 0) for number in range(blocks))
    assert len(Layout(tensors, BLOCK).blocks) == blocks
    return JobSpec(job=job, tensors=tensors, optimizer="adamw", block_elements=BLOCK, **fields)


def address_of(name: str, machine: str = "here") -> Address:
    return Address(name, "127.0.0.1", 5000 + sum(name.encode()), machine, f"/{name}")


def enlist(spec: JobSpec, rank: int | None = 0, *, token: str = "secret", incarnation: str = "a") -> Enlist:
    return Enlist(spec, token, rank, incarnation, "here")


class Peer:
    """One link to the master. `received` is all that came over it."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        self._url = url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.received: list[Any] = []
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        try:
            self.socket = await self._session.ws_connect(f"{self._url}/v1/link", headers=self._headers)
        except BaseException:
            await self._session.close()
            raise
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._reader.cancel()
        await self.socket.close()
        await self._session.close()

    async def ended(self) -> None:
        """Waits until the master has ended the link."""
        async with asyncio.timeout(10):
            await self._reader

    async def say(self, message: messages.ToMaster) -> None:
        await self.socket.send_bytes(messages.encoder().encode(message))

    async def heard(self, kind: type, count: int = 1, **fields: Any) -> Any:
        """The last of at least `count` messages of this kind with these fields; waits for it."""
        async with asyncio.timeout(10):
            while True:
                found = [
                    message
                    for message in self.received
                    if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items())
                ]
                if len(found) >= count:
                    return found[-1]
                self._news.clear()
                await self._news.wait()

    async def _read(self) -> None:
        decode = messages.decoder(messages.FromMaster).decode
        async for frame in self.socket:
            message = decode(frame.data)
            self.received.append(message)
            self._news.set()
            await self.act(message)

    async def act(self, message: Any) -> None: ...


class FakeAggregator(Peer):
    """applied: step of each block of each job that is here and complete. commits: what it would answer to Hold."""

    def __init__(
        self,
        url: str,
        name: str,
        *,
        pid: int = 1,
        key: str | None = None,
        memory: int = 1 << 30,
        service_key: str = KEY,
        hosts: tuple[JobSpec, int, dict[int, int]] | None = None,
    ) -> None:
        """hosts: a job that it has when it registers, its epoch, and the step of each block."""
        super().__init__(url, key=key)
        self.name = name
        self.pid = pid
        self.memory = memory
        self.service_key = service_key
        self.applied: dict[str, dict[int, int]] = {}
        self.commits: dict[str, tuple[HeldCommit, ...]] = {}
        self.moved: list[Move] = []
        self._jobs: tuple[HostedJob, ...] = ()
        if hosts is not None:
            spec, epoch, applied = hosts
            states = tuple(BlockState(*pair) for pair in applied.items())
            self._jobs = (HostedJob(spec, "secret", epoch, (0,), states),)
            self.applied[spec.job] = dict(applied)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.say(Register(address_of(self.name), self.service_key, self.pid, self.memory, self._jobs))
        await self.heard(messages.Registered)
        return self

    async def act(self, message: Any) -> None:
        match message:
            case Host():
                blocks = dict.fromkeys(message.blocks, message.applied)
                self.applied[message.spec.job] = blocks
                if message.source != "worker":
                    await self._ready(message.spec.job, message.epoch)
            case Hold():
                states = tuple(BlockState(*pair) for pair in self.applied.get(message.job, {}).items())
                await self.say(Held(message.job, message.epoch, states, self.commits.get(message.job, ())))
            case Complete():
                self.applied[message.job].update(dict.fromkeys(message.blocks, message.step))
                await self._ready(message.job, message.epoch)
            case Move():
                self.moved.append(message)
                step = [self.applied[message.job].pop(block) for block in message.blocks][-1]
                await self.say(MovedOut(message.job, message.epoch, message.blocks, message.to.aggregator, step))
            case Drop():
                self.applied.pop(message.job, None)
            case Stop():
                await self.socket.close()

    async def _ready(self, job: str, epoch: int) -> None:
        states = tuple(BlockState(*pair) for pair in self.applied[job].items())
        await self.say(Ready(job, epoch, states))


class FakeAgent(Peer):
    async def enlist(self, spec: JobSpec, rank: int | None = 0, **fields: Any) -> None:
        await self.say(enlist(spec, rank, **fields))

    async def placed(self, **fields: Any) -> Placement:
        found = await self.heard(Placement, **fields)
        assert isinstance(found, Placement)
        return found
