"""What a worker and the aggregators of its job send each other: carries out what `Progress` orders, and tells it what
comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from computron.errors import JobRefused
from computron.parameter_service.agent.actions import (
    Action,
    Connect,
    Disconnect,
    Fail,
    JoinLater,
    Map,
    Send,
    Unshare,
)
from computron.parameter_service.agent.change import Change
from computron.parameter_service.agent.connections import Connections
from computron.parameter_service.agent.parameters import FlatParameters, close_all
from computron.parameter_service.agent.progress import Progress
from computron.parameter_service.agent.questions import Answer, Question, Questions
from computron.parameter_service.agent.staging import Staging
from computron.parameter_service.layout import Layout
from computron.parameter_service.specs import PARAMETERS
from computron.parameter_service.wire.link import Link
from computron.parameter_service.wire.messages import (
    Address,
    Applied,
    Contents,
    Data,
    Extra,
    ExtraTaken,
    Join,
    Joined,
    Moved,
    Norms,
    Parameters,
    Placement,
    Push,
    Pushed,
    Read,
    Refused,
    Write,
    Written,
)

JOIN_PAUSE = 0.1  # seconds before an aggregator is asked again what it has


class Exchange:
    """Receiver of all links; it belongs to the event loop's thread. changed: held while the progress changes, and
    notified. unreachable: told of an aggregator and why. failed: told of what ends the job here.
    """

    def __init__(
        self,
        progress: Progress,
        layout: Layout,
        parameters: FlatParameters,
        staging: Staging,
        machine: str,
        changed: Change,
        unreachable: Callable[[Address, str], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.skipped = False  # the last step changed nothing
        self._progress, self._layout, self._parameters, self._staging = progress, layout, parameters, staging
        self._changed, self._failed = changed, failed
        self._questions = Questions(self._link_for, self._send_question)
        self._connections = Connections(self, machine, self._opened, unreachable, failed)

    def handle(self, *events: Callable[[], Iterable[Action]], fds: dict[int, int] | None = None) -> None:
        with self._changed:
            for event in events:
                for action in event():
                    self._perform(action, fds or {})
            self._questions.done(self._progress.step)
            self._changed.tell()

    def _perform(self, action: Action, fds: dict[int, int]) -> None:
        match action:
            case Connect(address):
                self._connections.open(address)
            case Disconnect(aggregator):
                self._connections.drop(aggregator)
            case Send(to, message):
                self._send(to, message)
            case Map(block):
                self._parameters.show(self._layout.blocks[block], fds[block])
            case Unshare(block):
                self._parameters.unshare(self._layout.blocks[block])
            case JoinLater(aggregator):
                asyncio.get_running_loop().call_later(JOIN_PAUSE, self.handle, lambda: self._progress.join(aggregator))
            case Fail(code, message):
                self._failed(JobRefused(f"job {self._progress.job}: {message} ({code})"))

    def _send(self, to: str, message: Data) -> None:
        link = self._connections.link(to)
        if link is None:
            return
        match message:
            case Join(shared=True):
                link.send(message, fds=[self._staging.segment.fd])
            case Push(block=block):
                link.send(message, payload=self._staging.bytes_of(self._layout.blocks[block]))
            case Write(block=block):
                link.send(message, payload=self._parameters.bytes_of(self._layout.blocks[block]))
            case _:
                link.send(message)

    def _joined(self, aggregator: str) -> bool:
        """Whether it knows us in this epoch."""
        peer = self._progress.peers.get(aggregator)
        return peer is not None and peer.joined

    @property
    def extras_left(self) -> bool:
        """Some that belong to a version are not where they belong."""
        return self._questions.extras_left

    def close(self) -> None:
        self._connections.close()

    def _opened(self, aggregator: str, shared: bool) -> None:
        self.handle(lambda: self._progress.connected(aggregator, shared))

    # wire.link.Receiver

    def destination(self, link: Link, message: Data, size: int) -> memoryview | None:
        sender = self._connections.name_of(link)
        if sender is None:
            return None
        match message:
            case Parameters(step=step, block=block) if self._progress.accepts(sender, block, step):
                return self._filled(block, size)
            case Contents(block=block, part=part, applied=applied):
                if part != PARAMETERS:
                    return self._questions.place_for(link, message, size)
                state = self._progress.blocks[block]
                if state.hosted and state.owner == sender and applied >= state.applied:
                    return self._filled(block, size)
        return None

    def _filled(self, block: int, size: int) -> memoryview:
        into = self._parameters.bytes_of(self._layout.blocks[block])
        if len(into) != size:
            raise ValueError(f"block {block} has {len(into)} bytes, and {size} come")
        self._progress.fills(block)
        return into

    def received(self, link: Link, message: Data, fds: list[int]) -> None:
        sender = self._connections.name_of(link)
        try:
            if sender is not None:
                with_block = (
                    dict(zip((hosted.block for hosted in message.blocks), fds, strict=False))
                    if isinstance(message, Joined)
                    else {}
                )
                self.handle(lambda: self._event(link, sender, message), fds=with_block)
        finally:
            close_all(fds)

    def lost(self, link: Link, reason: str) -> None:
        sender = self._connections.name_of(link)
        if sender is not None:
            self.handle(lambda: self._progress.lost(sender))
            self._connections.lost(sender, reason)

    def _event(self, link: Link, sender: str, message: Data) -> list[Action]:
        progress = self._progress
        match message:
            case Joined():
                actions = progress.joined(sender, message)
                self._questions.send()
                return actions
            case Applied():
                self.skipped = message.skipped
                return progress.applied(sender, message)
            case Parameters():
                self.skipped = message.skipped
                return progress.read(sender, message.block, message.step)
            case Contents(part=part) if part == PARAMETERS:
                return progress.read(sender, message.block, message.applied)
            case Contents() | Written() | ExtraTaken():
                self._questions.answered(link, message)
            case Moved():
                return progress.moved(sender, message)
            case Pushed():
                return progress.pushed(sender, message)
            case Norms():
                return progress.norms(sender, message)
            case Refused():
                self._questions.refused(link, message)
                return progress.refused(sender, message)
        return []

    def placed(self, placement: Placement) -> None:
        def event() -> list[Action]:
            generation = self._progress.generation
            epoch = self._progress.epoch
            actions = self._progress.placed(placement)
            if self._progress.epoch != epoch:
                self._questions.new_epoch()
            if self._progress.generation != generation:
                self._questions.drop_extras()
            return actions

        self.handle(event)

    def ask(self, message: Question, memory: memoryview, then: Answer) -> list[Action]:
        if not isinstance(message, Write) or message.epoch == self._progress.epoch:
            self._questions.ask(message, memory, then)
        return []

    def _link_for(self, message: Question) -> Link | None:
        """To the owner, if that knows us."""
        state = self._progress.blocks[0 if isinstance(message, Extra) else message.block]
        known = self._joined(state.owner) if isinstance(message, Write) else state.hosted
        return self._connections.link(state.owner) if known else None

    def _send_question(self, link: Link, message: Question, memory: memoryview) -> None:
        match message:
            case Read():
                link.send(message)
            case Write():
                link.send(message, payload=memory)
            case Extra():
                link.send(msgspec.structs.replace(message, epoch=self._progress.epoch), payload=memory)
