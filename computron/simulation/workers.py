"""The published worker processes, one for each pipeline stage: messages in order, polled for, each with its own link.

Tensor-parallel workers of one stage do the same at the same time, so that one stands for all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from computron.simulation.clock import Clock
from computron.simulation.link import EPSILON, Transfer, VirtualLink


@dataclass(frozen=True, slots=True)
class Polling:
    """receive: a worker without a message looks again after this. acknowledge: so does the thread that awaits copies.

    retry: who finds the inbox of a worker full tries again after this, and does nothing else until then.
    """

    receive: float
    acknowledge: float
    retry: float


@dataclass(slots=True, eq=False)
class Batch:
    """A message: run these requests. seconds: of compute, all stages together. begun: by the first stage."""

    model: str
    requests: tuple[int, ...]
    sent: float
    seconds: float
    begun: float = math.nan


@dataclass(slots=True, eq=False)
class Copy:
    """A message: bring these frames of the model, or write them back. busy: seconds that a link had for it."""

    model: str
    load: bool
    frames: int
    sent: float
    busy: float = 0.0


Message = Batch | Copy


class Worker:
    """Handles one message after the other. What its batches need to copy queues behind the swap-ins that came before.

    A message of a copy goes on to the next stage before the copy starts, so that all stages copy at once. The worker
    does not wait for copies: `report` follows when a thread of its own has seen the end.
    """

    def __init__(
        self,
        clock: Clock,
        link: VirtualLink,
        polling: Polling,
        stages: int,
        following: Worker | None,
        report: Callable[[Worker, Message], None],
        taken: Callable[[], None] | None,
    ) -> None:
        """report: of every copy, and of batches that leave the last stage. taken: called when the inbox has room."""
        self._clock = clock
        self._link = link
        self._polling = polling
        self._stages = stages
        self._following = following
        self._report = report
        self._taken = taken
        self._inbox: deque[Message] = deque()
        self._busy = False
        self._idle_since = clock.now
        self._loads: set[Copy] = set()
        self._held: tuple[Batch, set[Copy]] | None = None  # a batch, and the swap-ins that its inputs queue behind
        self._threads = {
            True: _Acknowledger(clock, polling.acknowledge),
            False: _Acknowledger(clock, polling.acknowledge),
        }

    @property
    def full(self) -> bool:
        """One message waits."""
        return bool(self._inbox)

    @property
    def at_work(self) -> bool:
        return self._busy or self.full or any(thread.waits for thread in self._threads.values())

    def put(self, message: Message) -> None:
        """There is room."""
        self._inbox.append(message)
        if not self._busy:
            self._busy = True
            self._clock.at(next_poll(self._idle_since, self._polling.receive, self._clock.now), self._take)

    def _take(self) -> None:
        message = self._inbox.popleft()
        if self._taken is not None:
            self._taken()
        match message:
            case Batch():
                if math.isnan(message.begun):
                    message.begun = self._clock.now
                self._held = (message, set(self._loads))
                self._compute()
            case Copy():
                self._pass_on(message, self._start_copy)

    def _compute(self) -> None:
        """Unless copies of its inputs still wait behind swap-ins."""
        if self._held is None or self._held[1]:
            return
        batch, _ = self._held
        self._held = None
        self._clock.at(self._clock.now + batch.seconds / self._stages, self._computed, batch)

    def _computed(self, batch: Batch) -> None:
        if self._following is None:
            self._report(self, batch)
            self._go_on()
        else:
            self._pass_on(batch, lambda _: self._go_on())

    def _pass_on(self, message: Message, then: Callable[[Message], None]) -> None:
        if self._following is not None:
            if self._following.full:
                self._clock.at(self._clock.now + self._polling.retry, self._pass_on, message, then)
                return
            self._following.put(message)
        then(message)

    def _start_copy(self, message: Message) -> None:
        assert isinstance(message, Copy)
        thread = self._threads[message.load]
        thread.expect()
        if message.load:
            self._loads.add(message)
            self._link.bring(message.frames, 0, lambda transfer: self._copied(message, transfer))
        else:
            self._link.write_back(message.frames, lambda transfer: self._copied(message, transfer))
        self._go_on()

    def _copied(self, message: Copy, transfer: Transfer) -> None:
        message.busy = transfer.busy
        self._loads.discard(message)
        if self._held is not None and message in self._held[1]:
            self._held[1].discard(message)
            self._compute()
        self._threads[message.load].ended(lambda: self._report(self, message))

    def _go_on(self) -> None:
        if self._inbox:
            self._take()
        else:
            self._busy = False
            self._idle_since = self._clock.now


class _Acknowledger:
    """A thread that waits for the copies of one direction in turn, and looks for the next one only now and then."""

    def __init__(self, clock: Clock, interval: float) -> None:
        self._clock = clock
        self._interval = interval
        self._free = clock.now  # since when it waits for no copy, or when it will
        self.waits = 0

    def expect(self) -> None:
        """A copy starts now."""
        if not self.waits:
            self._free = next_poll(self._free, self._interval, self._clock.now)
        self.waits += 1

    def ended(self, seen: Callable[[], None]) -> None:
        """The first of the copies has ended; `seen` is called when the thread finds out."""
        self._free = max(self._free, self._clock.now)
        self._clock.at(self._free, self._see, seen)

    def _see(self, seen: Callable[[], None]) -> None:
        self.waits -= 1
        seen()


def next_poll(last: float, interval: float, now: float) -> float:
    """Of someone who looks at last, last + interval and so on: when they see what happens now."""
    return last if now <= last else max(now, last + interval * math.ceil((now - last) / interval - EPSILON))
