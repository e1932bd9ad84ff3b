"""A group whose nodes are the published worker processes: its scheduler's actions are messages to the first stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from computron.scheduling.actions import Evict, Run, SwapIn
from computron.simulation.group import VirtualGroup
from computron.simulation.link import VirtualLink
from computron.simulation.log import EvictionRow, StepRow, SwapRow
from computron.simulation.workers import Batch, Copy, Message, Polling, Worker


@dataclass(frozen=True, slots=True)
class MessageTaken:
    """The first stage has taken the message that waited; there is room for another."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker's answer: of a copy, or of a batch (by the last stage only)."""

    stage: int
    message: Message


@dataclass(frozen=True, slots=True)
class Noticed:
    """An order: note that this request was first seen now."""

    request: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An order: these requests are answered now."""

    requests: tuple[int, ...]


class WorkerGroup(VirtualGroup):
    """Its decider is told `MessageTaken` and `Reported`, and orders whole models, `Noticed` and `Answer`."""

    def __init__(self, *arguments: Any, polling: Polling) -> None:
        super().__init__(*arguments)
        self._workers: list[Worker] = []
        following: Worker | None = None
        stages = self._hardware.stages
        for stage in reversed(range(stages)):
            link = VirtualLink(self._clock, self._hardware.link, self._hardware.frame_bytes)
            taken = self._taken if stage == 0 else None
            following = Worker(self._clock, link, polling, stages, following, self._reported, taken)
            self._workers.insert(0, following)
        self._copying: dict[Copy, int] = {}  # messages, and how many stages have still to report

    @property
    def at_work(self) -> bool:
        return any(worker.at_work for worker in self._workers)

    def _taken(self) -> None:
        self._tell(MessageTaken())

    def _perform(self, action: Any) -> None:
        match action:
            case Noticed(request):
                if request >= 0:
                    self._log.noticed[request] = self._clock.now - self._future.begin
            case Answer(requests):
                self._answer(requests)
            case _:
                super()._perform(action)

    def _swap_in(self, action: SwapIn) -> None:
        self._copy(Copy(action.model, True, len(action.pages), self._clock.now))

    def _evict(self, action: Evict) -> None:
        now, frames = self._clock.now, len(action.pages)
        self._copy(Copy(action.model, False, frames, now))
        if self._observer is not None:
            self._observer.pages_left(self.number, action.model, frames)
        written = frames * self._link.frame_seconds
        self._log.evictions.append(EvictionRow(self.number, action.model, now - self._future.begin, frames, written))

    def _copy(self, message: Copy) -> None:
        self._copying[message] = len(self._workers)
        self._workers[0].put(message)

    def _run(self, action: Run) -> None:
        self._workers[0].put(Batch(action.model, action.requests, self._clock.now, self._seconds(action)))

    def _seconds(self, action: Run) -> float:
        """All tokens of the longest answer follow in one forward; its batch is as it was to the end."""
        model = self._models[action.model]
        given = [self.live[request].arrival.seconds for request in action.requests]
        if any(seconds is not None for seconds in given):
            return sum(seconds or 0.0 for seconds in given)
        count = len(action.requests)
        context = sum(self.live[request].tokens for request in action.requests)
        seconds = model.step.seconds(count, context)
        for _ in range(max(self.live[request].left for request in action.requests) - 1):
            context += count
            seconds += model.step.seconds(count, 0, context)
        return seconds

    def _reported(self, worker: Worker, message: Message) -> None:
        now, epoch = self._clock.now, self._future.begin
        match message:
            case Batch(model, requests, _, seconds, begun):
                self._log.steps.append(StepRow(self.number, model, begun - epoch, now - epoch, seconds, len(requests)))
                for request in requests:
                    self.live[request].seconds += seconds
                    if request >= 0:
                        self._log.started[request] = begun - epoch
            case Copy(model, load, frames, sent, busy):
                self._copying[message] -= 1
                if self._copying[message] == 0:
                    del self._copying[message]
                    if load:
                        row = SwapRow(self.number, model, sent - epoch, now - epoch, busy, frames, 0, False, True)
                        self._log.swaps.append(row)
                        if self._observer is not None:
                            self._observer.pages_came(self.number, model, frames)
        self._tell(Reported(self._workers.index(worker), message))

    def _answer(self, requests: tuple[int, ...]) -> None:
        answered = self._clock.now + self._hardware.answer_overhead - self._future.begin
        for request in requests:
            live = self.live.pop(request)
            if request >= 0:
                self._log.first_token[request] = self._log.finished[request] = answered
            if self._observer is not None:
                self._observer.request_ended(self.number, live.arrival.model, live.seconds)
