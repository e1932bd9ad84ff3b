"""What the supervisor of a host's nodes decides, without processes and without a clock.

`Supervision.handle(event, now) -> orders`. A node that dies is started again, at once the first time and after longer
and longer pauses if it keeps dying; one that falls silent is killed. The launch ends when the leader has ended well,
when a node says that starting again cannot help, or when it is asked to.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from computron.group.environment import LEADER

CANNOT_START = 3  # exit code: the configuration or a checkpoint is wrong, so starting again would not help

PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before the first, second, ... start after a death
STEADY = 60.0  # seconds of life after which earlier deaths are forgotten
LEAVING = 60.0  # seconds that a node may take to end after it has closed its heartbeat
FOLLOWING = 5.0  # seconds within which the other nodes end by themselves once the leader has
KILLING = 10.0  # seconds beyond the time to drain, after which nodes that are still there are killed
REPEATED = 0.5  # seconds within which a second request to stop is the first one, delivered twice
LATE = 1.0  # a tick later than this shows that the supervisor itself was stopped


@dataclass(frozen=True, slots=True)
class Beat:
    """The node's event loop turns."""

    rank: int


@dataclass(frozen=True, slots=True)
class HeartbeatClosed:
    """The node is ending, in order or not."""

    rank: int


@dataclass(frozen=True, slots=True)
class Died:
    """The node's process has ended; `code` is minus the signal's number if a signal ended it."""

    rank: int
    code: int


@dataclass(frozen=True, slots=True)
class Asked:
    """This process was asked to stop."""

    signal: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Due every `Supervision.tick` seconds."""


Event = Beat | HeartbeatClosed | Died | Asked | Tick


@dataclass(frozen=True, slots=True)
class Start:
    """Start the node; `restarts` says how many times that was done before."""

    rank: int
    restarts: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send the signal to the node."""

    rank: int
    signal: int


@dataclass(frozen=True, slots=True)
class Told:
    """What an operator should know: `kind` is `died`, `hung` or `killed`; `pause`: until the next start, if any."""

    kind: str
    rank: int
    code: int = 0
    pause: float | None = None


Order = Start | Send | Told


@dataclass(slots=True)
class _Node:
    rank: int
    running: bool = False
    left: bool = False  # it has ended well
    condemned: bool = False  # SIGKILL is on its way
    started: float = 0.0
    start_at: float | None = 0.0
    silent_at: float | None = None  # when it counts as hung; None until it has been heard
    starts: int = 0
    deaths: int = 0  # in a row

    def pause(self, now: float) -> float:
        """Seconds until it should be started after the death that happened now."""
        self.deaths = 0 if now - self.started >= STEADY else self.deaths
        pause = PAUSES[min(self.deaths, len(PAUSES) - 1)]
        self.deaths += 1
        return pause


class Supervision:
    """The nodes of one host: `ranks`. Silence for `timeout` counts as hung; `drain`: what a stop in order may take."""

    def __init__(self, ranks: Sequence[int], timeout: float, drain: float) -> None:
        self._nodes = {rank: _Node(rank) for rank in ranks}
        self.timeout = timeout
        self._drain = drain
        self.tick = min(0.25, timeout / 4)
        self._ticked: float | None = None
        self._code: int | None = None  # what to end with, once it is decided that all shall end
        self._asked_at: float | None = None
        self._terminate_at: float | None = None
        self._kill_at: float | None = None

    @property
    def result(self) -> int | None:
        """The exit code once every node has ended and none is to be started again; None before."""
        return None if any(node.running for node in self._nodes.values()) else self._code

    def handle(self, event: Event, now: float) -> list[Order]:
        """What to do about it, in order. `now`: monotonic seconds."""
        match event:
            case Beat(rank):
                self._nodes[rank].silent_at = now + self.timeout
                return []
            case HeartbeatClosed(rank):
                self._nodes[rank].silent_at = now + max(self.timeout, LEAVING)
                return []
            case Died(rank, code):
                return self._died(self._nodes[rank], code, now)
            case Asked(number):
                return self._was_asked(number, now)
            case Tick():
                return self._time_passed(now)

    def _died(self, node: _Node, code: int, now: float) -> list[Order]:
        """1. All are ending: one less. 2. It cannot start, or the leader has ended well: all end.
        3. It has ended well: the leader will have told it, and ends too; if not, start it again. 4. Start it again.
        """
        node.running = False
        node.silent_at = None
        if self._code is not None:
            return self._ended(node, code, now)
        if code == CANNOT_START:
            self._end_all(code, kill_at=now + self._drain + KILLING)
            return [Told("died", node.rank, code), *self._terminate()]
        if code == 0 and (node.rank == LEADER or self._all_left(node)):
            self._end_all(0, kill_at=now + FOLLOWING + KILLING)
            self._terminate_at = now + FOLLOWING
            return [Told("died", node.rank)]
        pause = node.pause(now)
        if code == 0:
            node.left = True
            pause = max(pause, FOLLOWING)
        node.start_at = now + pause
        return [Told("died", node.rank, code, pause), *self._start_due(now)]

    def _all_left(self, last: _Node) -> bool:
        return all(node.left for node in self._nodes.values() if node is not last)

    def _ended(self, node: _Node, code: int, now: float) -> list[Order]:
        in_order = code == 0 or (self._asked_at is not None and code in (-signal.SIGTERM, 128 + signal.SIGTERM))
        if not in_order and self._code == 0:
            self._code = 1
        if node.rank == LEADER:
            self._terminate_at = now + FOLLOWING
        return [Told("died", node.rank, code)]

    def _was_asked(self, number: int, now: float) -> list[Order]:
        """The first time: the leader lets requests end and tells the others, wherever they are; without a leader here
        all nodes are told. The second time: kill them. `timeout` and other wrappers send the first one twice.
        """
        if self._asked_at is not None:
            if now - self._asked_at < REPEATED:
                return []
            self._code = 128 + number
            return self._kill()
        self._asked_at = now
        if self._code is None:
            self._end_all(0, kill_at=now + self._drain + KILLING)
        leader = self._nodes.get(LEADER)
        if leader is not None and leader.running:
            return [Send(LEADER, signal.SIGTERM)]
        return self._terminate()

    def _end_all(self, code: int, kill_at: float) -> None:
        """From now on nobody is started again; whoever is there at `kill_at` is killed."""
        self._code = code
        self._kill_at = kill_at
        for node in self._nodes.values():
            node.start_at = None

    def _terminate(self) -> list[Order]:
        self._terminate_at = None
        return [Send(node.rank, signal.SIGTERM) for node in self._nodes.values() if node.running]

    def _kill(self) -> list[Order]:
        self._kill_at = None
        orders: list[Order] = []
        for node in self._nodes.values():
            if node.running and not node.condemned:
                node.condemned = True
                orders += [Told("killed", node.rank), Send(node.rank, signal.SIGKILL)]
        return orders

    def _time_passed(self, now: float) -> list[Order]:
        if self._ticked is not None and now - self._ticked > self.tick + LATE:
            # This process was stopped, perhaps the nodes too: that time says nothing about them.
            for node in self._nodes.values():
                if node.silent_at is not None:
                    node.silent_at = max(node.silent_at, now + self.timeout)
        self._ticked = now
        orders = [*self._start_due(now), *self._kill_hung(now)]
        if self._terminate_at is not None and now >= self._terminate_at:
            orders += self._terminate()
        if self._kill_at is not None and now >= self._kill_at:
            orders += self._kill()
        return orders

    def _start_due(self, now: float) -> list[Order]:
        orders: list[Order] = []
        for node in self._nodes.values():
            if not node.running and node.start_at is not None and now >= node.start_at:
                node.running, node.started, node.start_at = True, now, None
                node.left = node.condemned = False
                orders.append(Start(node.rank, node.starts))
                node.starts += 1
        return orders

    def _kill_hung(self, now: float) -> list[Order]:
        orders: list[Order] = []
        for node in self._nodes.values():
            if node.running and not node.condemned and node.silent_at is not None and now >= node.silent_at:
                node.condemned = True
                orders += [Told("hung", node.rank), Send(node.rank, signal.SIGKILL)]
        return orders
