"""A master that does what a test says, workers that are nothing but a link each, and real aggregators."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from computron.parameter_service.aggregator.kernels import DTYPES
from computron.parameter_service.aggregator.process import Aggregator, AggregatorSettings
from computron.parameter_service.layout import Layout, TensorSpec
from computron.parameter_service.wire.link import Link, connect
from computron.parameter_service.wire.machine import machine_id
from computron.parameter_service.wire.messages import (
    Address,
    Applied,
    Commit,
    Complete,
    Contents,
    ExtraTaken,
    Flush,
    Held,
    HeldCommit,
    Hold,
    Host,
    Hyperparameters,
    JobSpec,
    Join,
    Joined,
    Move,
    Moved,
    MovedOut,
    Norms,
    Parameters,
    Push,
    Pushed,
    Read,
    Ready,
    Refused,
    Register,
    ToMaster,
    Write,
    Written,
    decoder,
    encoder,
)
from computron.parameter_service.wire.segments import Segment

TOKEN = "secret"
KEY = "the service's key"
MIB = 1 << 20
NEVER = 1 << 40  # kept: of a job that may go on, whatever has been saved


class FakeMaster:
    """What aggregators told it, by who told it."""

    def __init__(self) -> None:
        self.addresses: dict[str, Address] = {}
        self.told: list[tuple[str, Any]] = []
        self.registered: dict[str, Register] = {}
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._changed = asyncio.Condition()

    async def link(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=64 * MIB)
        await socket.prepare(request)
        who = ""
        decode = decoder(ToMaster).decode
        async for raw in socket:
            message = decode(raw.data)
            if isinstance(message, Register):
                who = message.address.aggregator
                self.addresses[who], self._sockets[who], self.registered[who] = message.address, socket, message
            async with self._changed:
                self.told.append((who, message))
                self._changed.notify_all()
        return socket

    async def send(self, to: str, message: Any) -> None:
        await self._sockets[to].send_bytes(encoder().encode(message))

    async def cut(self, who: str) -> None:
        """Its link to the master breaks."""
        await self._sockets[who].close()

    async def heard(self, what: Callable[[str, Any], bool], count: int = 1) -> list[tuple[str, Any]]:
        """Wait until so many messages that fit have come, and take them."""
        async with asyncio.timeout(10), self._changed:
            while True:
                found = [entry for entry in self.told if what(*entry)]
                if len(found) >= count:
                    self.told = [entry for entry in self.told if entry not in found]
                    return found
                await self._changed.wait()

    async def host(self, spec: JobSpec, owners: dict[str, Sequence[int]], *, epoch: int = 1, source: str = "worker",
                   members: Sequence[int] = (0,), applied: int = 0, kept: int = NEVER) -> None:  # fmt: skip
        """Waits until all are ready, unless a worker is to bring the state."""
        for who, blocks in owners.items():
            await self.send(who, Host(spec, TOKEN, epoch, tuple(members), tuple(blocks), applied, source, kept))
        await self.heard(lambda who, m: isinstance(m, Ready) and m.epoch == epoch, len(owners))

    async def move(self, spec: JobSpec, who: str, to: str, blocks: Sequence[int], epoch: int = 1) -> None:
        await self.send(who, Move(spec.job, epoch, tuple(blocks), self.addresses[to]))

    async def moved(self, count: int) -> None:
        await self.heard(lambda who, m: isinstance(m, MovedOut), count)

    async def hold(self, spec: JobSpec, epoch: int, *whom: str) -> dict[str, Held]:
        for who in whom:
            await self.send(who, Hold(spec.job, epoch))
        found = await self.heard(lambda who, m: isinstance(m, Held) and m.epoch == epoch, len(whom))
        return dict(found)

    async def complete(self, spec: JobSpec, epoch: int, who: str, step: int, blocks: Sequence[int],
                       commits: Sequence[HeldCommit]) -> None:  # fmt: skip
        await self.send(who, Complete(spec.job, epoch, step, tuple(blocks), tuple(commits)))
        await self.heard(lambda who, m: isinstance(m, Ready) and m.epoch == epoch)


class RawWorker:
    """Knows what is where from what it is told. shared: takes part through shared memory, else through TCP."""

    def __init__(self, master: FakeMaster, spec: JobSpec, rank: int = 0, *, shared: bool = True) -> None:
        self.spec, self.rank, self.shared = spec, rank, shared
        self.layout = Layout(spec.tensors, spec.block_elements)
        self.owner: dict[int, str] = {}
        self.applied: dict[int, int] = {}
        self.refused: list[Refused] = []
        self.norms: dict[int, float] = {}
        self.skipped = False
        self.taken = 0  # tensors of versions
        self.epoch = 1
        self.incarnation = uuid.uuid4().hex
        self._master = master
        self._links: dict[str, Link] = {}
        dtype = DTYPES[spec.gradients]
        self._staging = Segment.create("staging", self.layout.elements * dtype.itemsize)
        self.gradient = self._staging.tensor(dtype, 0, self.layout.elements)
        self.parameters = torch.zeros(self.layout.elements)
        self._segments: dict[int, Segment] = {}
        self._contents: dict[tuple[int, str], Tensor] = {}
        self._pushed = self._written = 0
        self._again: Callable[[Sequence[int]], Any] | None = None
        self._changed = asyncio.Event()
        self._connecting = asyncio.Lock()
        self._token = TOKEN

    async def link(self, who: str) -> Link:
        """One that has been joined through."""
        async with self._connecting:
            if who not in self._links:
                machine = machine_id() if self.shared else "elsewhere"
                self._links[who] = await connect(self._master.addresses[who], self, machine=machine)
                self._join(self._links[who])
            return self._links[who]

    def _join(self, link: Link) -> None:
        join = Join(self.spec.job, self._token, self.rank, self.incarnation, self.epoch, self.shared)
        link.send(join, fds=[self._staging.fd] if self.shared else ())

    async def join(self, owners: dict[str, Sequence[int]], token: str = TOKEN) -> None:
        """Again at those that it knows already."""
        self._token = token
        for who, blocks in owners.items():
            self.owner.update(dict.fromkeys(blocks, who))
            if who in self._links:
                self._join(self._links[who])
            await self.link(who)

    async def _follow(self, who: str, blocks: Sequence[int]) -> None:
        await self.link(who)
        if self._again is not None:
            await self._again(blocks)

    async def initialise(self, parameters: Tensor) -> None:
        """parameters: the flat space."""
        for block in self.layout.blocks:
            link = await self.link(self.owner[block.index])
            part = parameters[block.start : block.start + block.elements].contiguous()
            write = Write(self.spec.job, self.epoch, block.index, "parameters", 0, True)
            link.send(write, payload=part.numpy().data)
        await self.until(lambda: self._written == len(self.layout.blocks))
        self.parameters.copy_(parameters)

    async def push(self, step: int) -> None:
        """Stage `gradient` everywhere."""
        if self.shared:
            return
        for block in self.layout.blocks:
            link = await self.link(self.owner[block.index])
            part = self.gradient[block.start : block.start + block.elements]
            link.send(Push(self.spec.job, self.epoch, step, block.index), payload=part.view(torch.uint8).numpy().data)
        self._pushed = 0
        owners = set(self.owner.values())
        for who in owners:
            (await self.link(who)).send(Flush(self.spec.job, step))
        await self.until(lambda: self._pushed == len(owners))

    async def commit(self, step: int, *groups: Hyperparameters, **more: Any) -> None:
        """At all owners that it knows of; again, with the gradient, for blocks that turn out to be elsewhere."""
        self._again = lambda blocks: self._commit_again(blocks, step, *groups, **more)
        await self.push(step)
        for who in sorted(set(self.owner.values())):
            await self.commit_at(who, step, *groups, **more)

    async def _commit_again(self, blocks: Sequence[int], step: int, *groups: Hyperparameters, **more: Any) -> None:
        await asyncio.sleep(0.02)  # a `Moved` or a `Joined` is on its way
        for index in blocks:
            block, who = self.layout.blocks[index], self.owner[index]
            if not self.shared:
                part = self.gradient[block.start : block.start + block.elements]
                push = Push(self.spec.job, self.epoch, step, index)
                (await self.link(who)).send(push, payload=part.view(torch.uint8).numpy().data)
            await self.commit_at(who, step, *groups, **{**more, "blocks": (index,)})

    async def commit_at(self, who: str, step: int, *groups: Hyperparameters, **more: Any) -> None:
        (await self.link(who)).send(Commit(self.spec.job, self.epoch, step, groups, **more))

    async def answered(self, step: int) -> None:
        await self.until(lambda: all(self.applied.get(b.index, 0) >= step for b in self.layout.blocks))
        for index, segment in self._segments.items():
            block = self.layout.blocks[index]
            part = segment.tensor(torch.float32, 0, block.elements)
            self.parameters[block.start : block.start + block.elements] = part

    async def read(self, part: str) -> Tensor:
        """The flat space of a part."""
        self._contents.clear()
        for block in self.layout.blocks:
            (await self.link(self.owner[block.index])).send(Read(self.spec.job, block.index, part))
        await self.until(lambda: len(self._contents) == len(self.layout.blocks))
        return torch.cat([self._contents[block.index, part] for block in self.layout.blocks])

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not what():
                self._changed.clear()
                await self._changed.wait()

    def kill(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def destination(self, link: Link, message: Any, size: int) -> memoryview | None:
        block = self.layout.blocks[message.block]
        if isinstance(message, Contents):
            into = self._contents[message.block, message.part] = torch.empty(block.elements)
        else:
            into = self.parameters[block.start : block.start + block.elements]
        return into.view(torch.uint8).numpy().data

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        match message:
            case Joined():
                for hosted, fd in zip(message.blocks, fds, strict=bool(fds)):
                    self._segments[hosted.block] = Segment(fd, self.layout.blocks[hosted.block].nbytes)
            case Applied():
                self.skipped = message.skipped
                self.applied.update(dict.fromkeys(message.blocks, message.step))
            case Parameters():
                self.skipped = message.skipped
                self.applied[message.block] = message.step
            case Moved():
                theirs = [block for block in message.blocks if self._links.get(self.owner.get(block, "")) is link]
                if not theirs:
                    return  # it was told again of what others have given away since
                self.owner.update(dict.fromkeys(theirs, message.to.aggregator))
                self._joining = asyncio.ensure_future(self._follow(message.to.aggregator, theirs))
            case Pushed():
                self._pushed += 1
            case Written():
                self._written += 1
            case ExtraTaken():
                self.taken += 1
            case Norms():
                self.norms.update(message.blocks)
            case Refused(code="not_owner") if self._again is not None:
                self._joining = asyncio.ensure_future(self._again(message.blocks))
            case Refused():
                self.refused.append(message)
        self._changed.set()

    def lost(self, link: Link, reason: str) -> None:
        self._links = {who: known for who, known in self._links.items() if known is not link}
        self._changed.set()


@asynccontextmanager
async def cluster(*names: str, folder: Path | None = None, memory: int = 64 * MIB) -> AsyncIterator[FakeMaster]:
    """Aggregators of these names, registered with a fake master."""
    master = FakeMaster()
    app = web.Application()
    app.router.add_get("/v1/link", master.link)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    running = []
    for name in names:
        settings = AggregatorSettings(url, "127.0.0.1", 0, memory, KEY, folder, name)
        running.append(asyncio.create_task(Aggregator(settings).run()))
    try:
        await master.heard(lambda who, m: isinstance(m, Register), len(names))
        yield master
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await runner.cleanup()


def job(
    shapes: Sequence[tuple[int, ...]] = ((300, 17), (5,), (64, 64), (3000,), (7,)),
    *,
    block_elements: int = 2048,
    **more: Any,
) -> JobSpec:
    """Tensors that fill no vector, share blocks, and are split."""
    tensors = tuple(TensorSpec(f"t{number}", shape, "float32", 0) for number, shape in enumerate(shapes))
    return JobSpec("job", tensors, more.pop("optimizer", "adamw"), block_elements, **more)


class Reference:
    """torch's own optimizer, in one process, on one thread."""

    def __init__(self, spec: JobSpec, seed: int = 0, **settings: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layout = Layout(spec.tensors, spec.block_elements)
        self.generator = generator
        self.parameters = [torch.nn.Parameter(torch.randn(t.shape, generator=generator)) for t in spec.tensors]
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
        self.optimizer = kind(self.parameters, fused=True, **settings)

    def gradients(self) -> list[Tensor]:
        return [torch.randn(p.shape, generator=self.generator) for p in self.parameters]

    def step(self, gradients: Sequence[Sequence[Tensor]], average: bool = True) -> None:
        """gradients: of each worker, in order of rank."""
        for place, parameter in enumerate(self.parameters):
            total = gradients[0][place].float()
            for other in gradients[1:]:
                total = total + other[place].float()
            parameter.grad = total / len(gradients) if average else total
        self.optimizer.step()

    def flat(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        flat = torch.zeros(self.layout.elements)
        for offset, tensor in zip(self.layout.offsets, tensors or self.parameters, strict=True):
            flat[offset : offset + tensor.numel()] = tensor.detach().float().flatten()
        return flat
