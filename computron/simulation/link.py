"""The link between host and device as a fluid: the most urgent transfer has it, and yields to more urgent ones.

A copy in the other direction, by a system that writes weights back, slows both (`Link.duplex`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from computron.simulation.clock import Clock
from computron.simulation.hardware import Link


@dataclass(slots=True, eq=False)
class Transfer:
    """frames: to bring. left: seconds of the link that it still needs, latency included.

    done: called when the last frame has come. course: (time, left) whenever its speed changed, for `arrival`.
    """

    frames: int
    urgency: int
    number: int
    ordered: float
    left: float
    frame_seconds: float
    done: Callable[[Transfer], None]
    busy: float = 0.0
    course: list[tuple[float, float]] = field(default_factory=list)

    @property
    def arrived(self) -> int:
        """Whole frames that have come."""
        return min(self.frames, self.frames - _ceil(self.left / self.frame_seconds))

    def arrival(self, frame: int) -> float:
        """When the frame, counted from 0, had come. The transfer has ended."""
        left = (self.frames - 1 - frame) * self.frame_seconds
        for (begin, before), (end, after) in zip(self.course, self.course[1:], strict=False):
            if after <= left + EPSILON:
                return end if before <= after else begin + (end - begin) * max(0.0, before - left) / (before - after)
        return self.course[-1][0]


EPSILON = 1e-9


def _ceil(value: float) -> int:
    whole = int(value)
    return whole if value - whole <= EPSILON else whole + 1


class VirtualLink:
    def __init__(self, clock: Clock, link: Link, frame_bytes: int) -> None:
        self._clock = clock
        self._link = link
        self.frame_seconds = frame_bytes / link.bandwidth
        self._down: list[Transfer] = []
        self._up: list[Transfer] = []
        self._moved_until = 0.0
        self._plan = 0
        self._ordered = 0

    def bring(self, frames: int, urgency: int, done: Callable[[Transfer], None]) -> Transfer:
        """A transfer to the device."""
        return self._add(self._down, frames, urgency, done)

    def write_back(self, frames: int, done: Callable[[Transfer], None]) -> Transfer:
        """A transfer from the device."""
        return self._add(self._up, frames, 0, done)

    def raise_urgency(self, transfer: Transfer, urgency: int) -> None:
        self._move()
        transfer.urgency = urgency
        self._plan_end()

    def cancel(self, transfer: Transfer) -> None:
        """It stops where it is; `done` is not called."""
        self._move()
        self._down.remove(transfer)
        self._plan_end()

    def _add(self, queue: list[Transfer], frames: int, urgency: int, done: Callable[[Transfer], None]) -> Transfer:
        self._move()
        self._ordered += 1
        now, seconds = self._clock.now, frames * self.frame_seconds
        left = seconds + (self._link.latency if frames else 0.0)
        transfer = Transfer(frames, urgency, self._ordered, now, left, self.frame_seconds, done, course=[(now, left)])
        queue.append(transfer)
        self._plan_end()
        return transfer

    def _moving(self) -> tuple[Transfer | None, Transfer | None]:
        down = self._down
        first = down[0] if len(down) == 1 else min(down, key=_order) if down else None
        return first, self._up[0] if self._up else None

    def _move(self) -> None:
        """Up to now, with nothing having ended before."""
        now = self._clock.now
        passed = now - self._moved_until
        self._moved_until = now
        if passed <= 0.0:
            return
        down, up = self._moving()
        speed = self._link.duplex if down is not None and up is not None else 1.0
        for transfer in (down, up):
            if transfer is not None:
                if len(transfer.course) == 1 or transfer.course[-1][0] < now - passed:
                    transfer.course.append((now - passed, transfer.left))
                transfer.left = max(0.0, transfer.left - passed * speed)
                transfer.busy += passed
                transfer.course.append((now, transfer.left))

    def _plan_end(self) -> None:
        self._plan += 1
        down, up = self._moving()
        speed = self._link.duplex if down is not None and up is not None else 1.0
        ends = [transfer.left / speed for transfer in (down, up) if transfer is not None]
        if ends:
            self._clock.at(self._clock.now + min(ends), self._end, self._plan)

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._move()
        rest = max(EPSILON, 2.0 * math.ulp(self._clock.now))  # late on the clock, times are coarser than EPSILON
        ended = [transfer for transfer in self._moving() if transfer is not None and transfer.left <= rest]
        for transfer in ended:
            (self._down if transfer in self._down else self._up).remove(transfer)
        self._plan_end()
        for transfer in ended:
            transfer.done(transfer)


def _order(transfer: Transfer) -> tuple[int, int]:
    return (transfer.urgency, transfer.number)
