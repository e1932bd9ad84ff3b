"""The published Computron (arXiv 2306.13835; github.com/dlzou/computron), with its strengths and its delays.

One loop does everything in turn. Every 10 ms it submits at most one thing to the workers, then collects at most one
answer of each worker:

1. Of the models with requests that are neither coming nor leaving, the one with the oldest request is next. Nothing is
   done for others, even where this one can only wait.
2. It is loaded: a batch of its requests goes out.
3. It is not, and fewer models than the cap are on the device or on their way: it is sent for.
4. It is not, and the device is full: the loaded model that was used least recently leaves, whether or not it has
   requests, and it is sent for at once, both in the same turn; without a loaded model it waits.

A model counts as loaded only once all workers have said so and the loop has seen it. Batches, loads and offloads are
messages in one queue to the first stage, which holds one. Who finds it full sleeps for 100 ms and looks again (`send`
in energonai/pipe.py of github.com/hpcaitech/EnergonAI), and with it sleeps the whole loop: no arrival and no answer is
noticed until then. An offload and the load that follows it in the same turn always meet this sleep, which is the
difference of their times in the paper's experiment 1 (0.11, 0.10 and 0.11 s for TP x PP = 1x1, 2x1 and 2x2).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from computron.scheduling.actions import Action, Evict, EvictionReason, Run, SwapIn, Urgency, WakeAt
from computron.scheduling.events import ModelAdded, ModelSpec, Request, RequestArrived, TimePassed
from computron.simulation.hardware import Hardware, SimulatedModel
from computron.simulation.systems.system import Setup, System
from computron.simulation.worker_group import Answer, MessageTaken, Noticed, Reported, WorkerGroup
from computron.simulation.workers import Batch, Copy, Message, Polling, next_poll

TICK = 0.010  # both loops of computron/engine.py sleep this long after each turn
POLLING = Polling(receive=0.010, acknowledge=0.020, retry=0.100)  # computron/worker.py; energonai/pipe.py


class _State(enum.Enum):
    OFFLOADED = enum.auto()
    LOADED = enum.auto()
    WAITING = enum.auto()  # coming or leaving


class Computron2023:
    """cap: how many models may be on the device or on their way. stages: how many workers answer to a load.

    retry: seconds of sleep before the loop looks again at a full inbox.
    """

    def __init__(self, cap: int, stages: int, retry: float = POLLING.retry) -> None:
        self._cap = cap
        self._retry = retry
        self._stages = stages
        self._specs: dict[str, ModelSpec] = {}
        self._states: dict[str, _State] = {}
        self._waiting: dict[str, deque[Request]] = {}  # of models with requests
        self._recent: list[str] = []  # loaded and coming models, least recently used first
        self._reports: list[deque[Message]] = [deque() for _ in range(stages)]
        self._confirmed: dict[Copy, int] = {}
        self._orders: list[Any] = []
        self._full = False  # one message waits at the first stage
        self._blocked = False
        self._unnoticed: list[Request] = []
        self._turn = 0.0  # when the loop looks next
        self._awake = False
        self._loop = self._turns()

    def handle(self, event: Any, now: float) -> list[Action]:
        self._orders = []
        match event:
            case ModelAdded(spec):
                self._specs[spec.model] = spec
                self._states[spec.model] = _State.OFFLOADED
            case RequestArrived(request):
                self._unnoticed.append(request)
                if not self._blocked:
                    self._notice()
            case MessageTaken():
                self._full = False
            case Reported(stage, message):
                self._reports[stage].append(message)
            case TimePassed():
                self._turn = now + next(self._loop)
                self._awake = False
        if not self._awake and (self._blocked or self._has_work()):
            self._awake = True
            self._turn = next_poll(self._turn, TICK, now)
            self._orders.append(WakeAt(self._turn))
        return self._orders

    def _has_work(self) -> bool:
        """Would the next turn of the loop do anything?"""
        if any(self._reports):
            return True
        model = self._next_model()
        if model is None:
            return False
        if self._states[model] is _State.LOADED or len(self._recent) < self._cap:
            return True
        return self._victim() is not None

    def _turns(self) -> Iterator[float]:
        """The loop. It yields for how long it sleeps."""
        while True:
            yield from self._submit()
            self._collect()
            self._notice()
            yield TICK

    def _notice(self) -> None:
        for request in self._unnoticed:
            self._waiting.setdefault(request.model, deque()).append(request)
            self._orders.append(Noticed(request.id))
        self._unnoticed.clear()

    def _next_model(self) -> str | None:
        heads = [
            (queue[0].arrival, model)
            for model, queue in self._waiting.items()
            if self._states[model] is not _State.WAITING
        ]
        return min(heads, key=lambda head: head[0])[1] if heads else None

    def _victim(self) -> str | None:
        return next((model for model in self._recent if self._states[model] is _State.LOADED), None)

    def _submit(self) -> Iterator[float]:
        model = self._next_model()
        if model is None:
            return
        if self._states[model] is _State.LOADED:
            self._recent.remove(model)
            self._recent.append(model)
            queue = self._waiting[model]
            count = min(len(queue), self._specs[model].max_batch_size)
            batch = tuple(queue.popleft().id for _ in range(count))
            if not queue:
                del self._waiting[model]
            yield from self._send(Run(model, batch))
            return
        if len(self._recent) >= self._cap:
            victim = self._victim()
            if victim is None:
                return
            self._recent.remove(victim)
            self._states[victim] = _State.WAITING
            yield from self._send(Evict(victim, self._pages(victim), EvictionReason.DEMAND))
        self._states[model] = _State.WAITING
        self._recent.append(model)
        yield from self._send(SwapIn(model, self._pages(model), Urgency.DEMAND))

    def _pages(self, model: str) -> tuple[int, ...]:
        return tuple(range(len(self._specs[model].pages)))

    def _send(self, message: Action) -> Iterator[float]:
        while self._full:
            self._blocked = True
            yield self._retry
        self._blocked = False
        self._full = True
        self._orders.append(message)

    def _collect(self) -> None:
        for reports in self._reports:
            if not reports:
                continue
            match message := reports.popleft():
                case Batch():
                    self._orders.append(Answer(message.requests))
                case Copy():
                    self._confirmed[message] = self._confirmed.get(message, 0) + 1
                    if self._confirmed[message] == self._stages:
                        del self._confirmed[message]
                        self._states[message.model] = _State.LOADED if message.load else _State.OFFLOADED


def whole_models(hardware: Hardware, models: Sequence[SimulatedModel]) -> int:
    """How many models fit the device at once, whichever they are; at least 1."""
    left, count = hardware.frames, 0
    for pages in sorted((model.pages(hardware.frame_bytes) for model in models), reverse=True):
        left -= pages
        if left < 0:
            break
        count += 1
    return max(1, count)


def _without_http(hardware: Hardware, models: Sequence[SimulatedModel]) -> Hardware:
    """Its clients are in its process, and its overhead comes of its loops."""
    return replace(hardware, request_overhead=0.0, answer_overhead=0.0, step_overhead=0.0)


def published(name: str, polling: Polling) -> System:
    """The published system, were it to poll like this."""

    class Group(WorkerGroup):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, polling=polling)

    def build(setup: Setup) -> Computron2023:
        cap = whole_models(setup.hardware, setup.models)
        return Computron2023(cap, setup.hardware.stages, polling.retry)

    return System(name, build, group=Group, hardware=_without_http)


COMPUTRON_2023 = published("computron2023", POLLING)
