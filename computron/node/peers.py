"""The other nodes of the group, as the leader knows them: who is there, what each has loaded, how far it follows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from computron.config import Config
from computron.errors import ConfigError, GroupBroken
from computron.group.channel import Body
from computron.group.codec import decode, encode
from computron.group.environment import Place
from computron.group.hello import Hello
from computron.group.hub import Hub
from computron.group.rendezvous import make_store
from computron.group.settings import group_settings
from computron.node import wire
from computron.node.agreement import Agreement
from computron.node.progress import Progress
from computron.node.worker import Worker

log = logging.getLogger(__name__)

WAITING_LINE = 10.0  # seconds between two log lines about nodes that are waited for


class Commander(Protocol):
    """Who is told what nodes report and that one has gone."""

    def reported(self, rank: int, report: wire.PagesCame | wire.StepDone | wire.StepFailed) -> None: ...

    def lost(self, rank: int, reason: str) -> None: ...


@dataclass(slots=True)
class _Peer:
    """`idle`, `formed`: the last epoch for which the node said so."""

    loaded: wire.Loaded | None = None
    idle: int = -1
    formed: int = -1
    figures: wire.Figures | None = None


@dataclass(slots=True)
class _Loading:
    """Bytes of each model that each node has loaded, put together for one display."""

    progress: Progress | None = None
    shares: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def tell(self, rank: int, model: str, done: int, total: int) -> None:
        shares = self.shares.setdefault(model, {})
        shares[rank] = (done, total)
        if self.progress is not None:
            parts = list(shares.values())
            self.progress(model, sum(part[0] for part in parts), sum(part[1] for part in parts))


class Peers:
    """`epoch` counts the times that the group was taken apart; what belongs to an earlier one is void.
    `why_not_formed`: what went wrong in the last attempt to form it, in words.
    """

    def __init__(self, config: Config, place: Place, commander: Commander) -> None:
        self.epoch = time.time_ns() // 1_000_000  # above those of leaders before this one
        self.why_not_formed: str | None = None
        self._place = place
        self._timeout = config.group.node_timeout
        self._commander = commander
        self._ranks = range(1, place.world_size)
        self._peers: dict[int, _Peer] = {}
        self._failures: dict[int, str] = {}  # of nodes that cannot serve what is configured, until they come again
        self._form_failure: str | None = None
        self._changed = asyncio.Event()
        self._loading = _Loading()
        self._hub = Hub(place, group_settings(config), self._timeout, self)

    async def open(self, progress: Progress | None) -> None:
        """Let the others come. `progress` hears of all nodes together. Raises ConfigError."""
        self._loading.progress = progress
        self._own_loop = asyncio.get_running_loop()
        await self._hub.open()

    def own_progress(self, model: str, done: int, total: int) -> None:
        """The leader's own share; any thread."""
        self._own_loop.call_soon_threadsafe(self._loading.tell, 0, model, done, total)

    async def close(self) -> None:
        self._hub.broadcast(encode(wire.Stop()))
        await self._hub.close()

    def send(self, rank: int, body: Body) -> None:
        self._hub.send(rank, body)

    def broadcast(self, body: Body) -> None:
        self._hub.broadcast(body)

    # Forming the group

    async def first_loaded(self) -> None:
        """Wait until all have loaded. Raises ConfigError if one of them cannot serve what is configured."""

        def all_loaded() -> bool:
            for rank, reason in self._failures.items():
                raise ConfigError(f"node {rank} cannot start: {reason}")
            return not self.missing()

        await self._wait(all_loaded)

    def missing(self) -> list[int]:
        """Nodes that are not there, or have not loaded yet."""
        return [rank for rank in self._ranks if rank not in self._peers or self._peers[rank].loaded is None]

    def why_incomplete(self) -> str:
        """What the group lacks, in words."""
        absent = [rank for rank in self._ranks if rank not in self._peers]
        if absent:
            words = f"waiting for node{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
        elif missing := self.missing():
            words = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} still loading"
        else:
            words = "its nodes are finding each other"
            words += f"; the last attempt failed: {self.why_not_formed}" if self.why_not_formed else ""
        failed = "; ".join(f"node {rank} could not start: {reason}" for rank, reason in sorted(self._failures.items()))
        return f"{words} (of {self._place.world_size} nodes){f'; {failed}' if failed else ''}"

    def loaded(self) -> list[wire.Loaded]:
        """What each of the others has loaded, by rank. All must be there."""
        return [loaded for rank in self._ranks if (loaded := self._peers[rank].loaded) is not None]

    def refuse(self, rank: int, reason: str) -> None:
        """This node cannot be one of the group as it is now. It ends, and may come again."""
        log.error("node_refused node=%d reason=%s", rank, reason)
        self.send(rank, encode(wire.Refuse(reason)))
        self._peers[rank].loaded = None
        self._failures[rank] = reason

    def reset(self) -> None:
        """All nodes that are there shall come to rest, for a new epoch."""
        self.epoch += 1
        self._hub.broadcast(encode(wire.Reset(self.epoch)))

    async def gather(self, worker: Worker) -> None:
        """Wait until all nodes are there, have loaded, and are at rest; the leader's own too."""
        await worker.reset()
        await self._wait(
            lambda: not self.missing() and all(self._peers[rank].idle == self.epoch for rank in self._ranks)
        )

    async def form(self, worker: Worker, agreement: Agreement) -> None:
        """Let all nodes find each other. Raises GroupBroken if one of them does not; all are told to rest then.

        Anything else that it raises, no further attempt would mend.
        """
        self._form_failure = None
        epoch = self.epoch
        store, port = make_store(self._place.master_host)
        for rank in self._ranks:
            order = wire.Form(epoch, self._place.master_host, port, agreement.identities(rank))
            self.send(rank, encode(order))
        own = asyncio.ensure_future(worker.form(epoch, self._place.master_host, port, self._timeout))
        own.add_done_callback(self._own_formed)
        try:
            async with asyncio.timeout(2 * self._timeout):
                await self._wait(lambda: _has_failed(own) or (self._all_formed(epoch) and own.done()))
            await own
            self._all_formed(epoch)
        except TimeoutError:
            late = [rank for rank in self._ranks if rank not in self._peers or self._peers[rank].formed != epoch]
            for rank in late:
                self._hub.drop(rank, "it did not find the other nodes in time")
            self._give_up(worker)
            raise GroupBroken(f"nodes {late} did not find the others in time") from None
        except GroupBroken:
            self._give_up(worker)
            raise
        finally:
            if not own.done():
                await asyncio.wait([own])
            own.exception()
            del store

    def _own_formed(self, own: asyncio.Future[None]) -> None:
        if not own.cancelled() and isinstance(error := own.exception(), GroupBroken):
            self._form_failure = error.message
        self._changed.set()

    def _all_formed(self, epoch: int) -> bool:
        if self._form_failure is not None:
            raise GroupBroken(self._form_failure)
        return all(rank in self._peers and self._peers[rank].formed == epoch for rank in self._ranks)

    def _give_up(self, worker: Worker) -> None:
        worker.abort()
        self.reset()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        """Until this holds, looked at whenever anything about the nodes has changed."""
        while not condition():
            self._changed.clear()
            try:
                async with asyncio.timeout(WAITING_LINE):
                    await self._changed.wait()
            except TimeoutError:
                log.info("waiting_for_group state=%s", self.why_incomplete())

    # What nodes say

    def joined(self, hello: Hello) -> None:
        self._peers[hello.rank] = _Peer()
        self._failures.pop(hello.rank, None)
        self.send(hello.rank, encode(wire.Reset(self.epoch)))
        self._changed.set()

    def left(self, rank: int, reason: str) -> None:
        del self._peers[rank]
        self._form_failure = f"node {rank} was lost: {reason}"
        self._changed.set()
        self._commander.lost(rank, reason)

    def received(self, rank: int, body: bytes) -> None:
        try:
            report: wire.Report = decode(body, wire.Report)
        except msgspec.MsgspecError as error:
            self._hub.drop(rank, f"it sent what is no report ({error})")
            return
        peer = self._peers[rank]
        match report:
            case wire.PagesCame() | wire.StepDone() | wire.StepFailed():
                self._commander.reported(rank, report)
                return
            case wire.Figures():
                peer.figures = report
                return
            case wire.Loading(model, done, total):
                self._loading.tell(rank, model, done, total)
                return
            case wire.Loaded():
                peer.loaded = report
            case wire.LoadFailed(reason):
                log.error("node_cannot_start node=%d reason=%s", rank, reason)
                self._failures[rank] = reason
            case wire.Idle(epoch):
                peer.idle = epoch
            case wire.Formed(epoch):
                peer.formed = epoch
            case wire.FormFailed(epoch, reason):
                if epoch == self.epoch:
                    self._form_failure = f"node {rank}: {reason}"
            case wire.NodeFailed(reason):
                self._hub.drop(rank, f"it can do nothing more: {reason}")
                return
        self._changed.set()

    def figures(self) -> Mapping[int, wire.Figures]:
        """The last ones of each node that is there."""
        return {rank: peer.figures for rank, peer in sorted(self._peers.items()) if peer.figures is not None}


def _has_failed(job: asyncio.Future[None]) -> bool:
    return job.done() and job.exception() is not None
