"""The master's decisions, with the clock as an argument: events in, orders out."""

from __future__ import annotations

import logging

from computron.parameter_service.layout import Layout
from computron.parameter_service.master.events import (
    Asked,
    Closed,
    Event,
    Exited,
    Finished,
    NotFinished,
    Order,
    Received,
    Started,
    Tick,
)
from computron.parameter_service.master.files import Files
from computron.parameter_service.master.hosts import Hosts
from computron.parameter_service.master.moves import Moves
from computron.parameter_service.master.placement import Packed
from computron.parameter_service.master.reconfiguration import Reconfiguration
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.requests import Requests
from computron.parameter_service.master.scaling import Scaling, ScalingSettings
from computron.parameter_service.master.state import Aggregator, Job, Limits, State, Worker
from computron.parameter_service.master.workers import Workers
from computron.parameter_service.packing import Packer
from computron.parameter_service.wire.messages import (
    Enlist,
    Failed,
    Held,
    Leave,
    Load,
    MovedOut,
    Progress,
    Ready,
    Register,
    Saved,
    ToMaster,
    Unreachable,
    Usage,
    WorkerLost,
)

log = logging.getLogger(__name__)


class Master:
    """Starts from what its log says; `now` is of a monotonic clock, in seconds."""

    def __init__(
        self, book: Book, packer: Packer, scaling: ScalingSettings, now: float, *, limits: Limits | None = None
    ) -> None:
        self.state = State(book, limits or Limits())
        self._reconfiguration = Reconfiguration(self.state, Packed(packer))
        self._workers = Workers(self.state, self._reconfiguration)
        self._hosts = Hosts(self.state, self._reconfiguration)
        self._moves = Moves(self.state)
        self._files = Files(self.state)
        self.scaling = Scaling(self.state, self._moves, packer, scaling, now)
        self._requests = Requests(self.state, self._moves, self.scaling)
        self._recall(now)
        self.scaling.recall()

    def handle(self, event: Event, now: float) -> list[Order]:
        """Raises ComputronError for what a person asked wrongly; then nothing has changed."""
        match event:
            case Received():
                self._received(event.link, event.message, now)
            case Closed():
                self._closed(event.link, now)
            case Started():
                self.scaling.started(event.aggregator)
                self._hosts.started(event.aggregator, event.pid, event.began, now)
            case Exited():
                self.scaling.exited(event.aggregator, now)
                self._hosts.gone(event.aggregator, now)
            case Finished():
                self._files.finished(event)
            case NotFinished():
                self._files.not_finished(event)
            case Tick():
                pass
            case _:
                self._asked(event, now)
        for job in self._concerned(event):
            self._reconfiguration.advance(job, now)
        if isinstance(event, Tick):
            self._files.look_for_extras(now)
            self.scaling.advance(now)
        orders, self.state.orders = self.state.orders, []
        return orders

    def _concerned(self, event: Event) -> list[Job]:
        """All jobs, unless the event is a message about one or about none."""
        if not isinstance(event, Received) or isinstance(event.message, Register):
            return list(self.state.jobs.values())
        match event.message:
            case Usage():
                return []
            case Enlist():
                name = event.message.spec.job
            case _:
                name = event.message.job
        return [self.state.jobs[name]] if name in self.state.jobs else []

    def _recall(self, now: float) -> None:
        """All that is in the book counts as away, not as dead."""
        for name, started in self.state.book.started.items():
            self.state.aggregators[name] = Aggregator(name, started.pid, now)
        for name, known in self.state.book.known.items():
            self.state.aggregators[name] = Aggregator(name, known.pid, now, known.address)
        for name, book in self.state.book.jobs.items():
            job = self.state.jobs[name] = Job(book, Layout(book.spec.tensors, book.spec.block_elements), now)
            if book.placed is not None:
                job.step = book.placed.applied
            job.step = max([job.step, *(snapshot.step for snapshot in book.counted)])
            for rank, incarnation in book.members.items():
                if rank not in book.gone:
                    job.workers[rank] = Worker(rank, incarnation, "", None, now, unlinked=now)

    def _asked(self, event: Asked, now: float) -> None:
        self._requests.handle(event, now)

    def _closed(self, link: int, now: float) -> None:
        match self.state.links.pop(link, None):
            case (job, rank):
                if job in self.state.jobs:
                    self._workers.closed(self.state.jobs[job], rank, link, now)
            case str(name):
                self._hosts.closed(name, link, now)

    def _received(self, link: int, message: ToMaster, now: float) -> None:
        match message:
            case Enlist():
                self._workers.enlist(link, message, now)
            case Register():
                self._hosts.register(link, message, now)
            case Leave():
                self._workers.left(link, message, now)
            case Load():
                self._workers.load(link, message)
            case Progress():
                self._workers.progress(link, message, now)
            case Unreachable():
                self._workers.unreachable(link, message, now)
            case _:
                name = self.state.links.get(link)
                if isinstance(name, str):
                    self._aggregator_says(name, message, now)

    def _aggregator_says(self, name: str, message: ToMaster, now: float) -> None:
        match message:
            case Usage():
                self._hosts.usage(name, message, now)
                return
            case Saved():
                self._files.saved(message, now)
                return
            case MovedOut():
                self._moves.moved_out(name, message, now)
                return
            case WorkerLost():
                self._workers.lost(name, message)
                return
        job = self.state.jobs.get(message.job) if isinstance(message, Held | Ready | Failed) else None
        if job is None:
            return
        match message:
            case Held():
                self._reconfiguration.held(job, name, message, now)
            case Ready():
                self._reconfiguration.ready(job, name, message)
            case Failed(order="move" | "step"):
                self._moves.failed(job, name, message, now)
            case Failed(order="host" | "hold" | "complete" | "restore" | "find"):
                self._reconfiguration.failed(job, name, message, now)
            case Failed(order="save"):
                self._files.not_saved(job, name, message)
            case Failed():
                self._files.not_published(job, name, message)
