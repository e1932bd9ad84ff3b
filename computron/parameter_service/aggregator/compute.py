"""The one thread that computes: work of all jobs, first that of the job which is latest.

Lateness is relative to what a job may lose: the time since the deadline, before it negative, as a share of the job's
allowance. Where nothing is late those come first that can wait the least; where much is, because the machine has too
few cores, jobs of long steps do not let those of short ones wait for all that they themselves are late with.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

FIRST = float("-inf")  # the deadline of what goes before everything


@dataclass(slots=True)
class Work:
    """owner: whose work it is. run: what is to be done. deadline: by time.monotonic(). allowance: seconds that its
    owner may lose in a step. done: for whoever gets it back, finished or withdrawn.

    seconds: of CPU time that it took. finished: when. error: what it raised, if it did.
    """

    owner: Hashable
    deadline: float
    allowance: float
    run: Callable[[], None]
    done: Callable[[Work], None]
    seconds: float = 0.0
    finished: float = 0.0
    error: Exception | None = None
    withdrawn: bool = False


class ComputeThread:
    """Work is small, so that the most urgent one waits for one other at most. Thread-safe.

    What is done is told in batches by `deliver`, in the compute thread: when an owner's work is done, or when the last
    batch was told `batch` seconds ago.
    """

    def __init__(self, deliver: Callable[[list[Work]], None], batch: float = 0.005) -> None:
        self.busy = 0.0  # seconds of CPU time, of all work
        self._deliver = deliver
        self._batch = batch
        self._condition = threading.Condition()
        self._waiting: dict[Hashable, deque[Work]] = {}  # in the order in which they came
        self._left: dict[Hashable, int] = {}  # those that wait, and the one that is being done
        self._behind: dict[Hashable, float] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="compute")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is waiting is not done any more; what is being done is waited for."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, *works: Work) -> None:
        """An owner's work is done in this order."""
        with self._condition:
            for work in works:
                self._waiting.setdefault(work.owner, deque()).append(work)
                self._left[work.owner] = self._left.get(work.owner, 0) + 1
            self._condition.notify()

    def behind(self, owner: Hashable) -> float:
        """Seconds of CPU time that others' work took while this owner's waited, since this was asked last."""
        with self._condition:
            return self._behind.pop(owner, 0.0)

    def withdraw(self, owner: Hashable) -> list[Work]:
        """Takes back what waits of this owner's. One may still be running: `submit` something FIRST to wait for it."""
        with self._condition:
            self._behind.pop(owner, None)
            mine = list(self._waiting.pop(owner, ()))
            if mine:
                self._left[owner] -= len(mine)
        for work in mine:
            work.withdrawn = True
        return mine

    def _loop(self) -> None:
        finished: list[Work] = []
        told = time.monotonic()
        while True:
            with self._condition:
                while not self._waiting and not self._stopping:
                    self._condition.wait()
                if self._stopping:
                    return
                work = self._latest(time.monotonic())
            self._do(work)
            finished.append(work)
            with self._condition:
                self._left[work.owner] -= 1
                last = not self._left[work.owner]
                if last:
                    del self._left[work.owner]
                self._note_behind(work)
                idle = not self._waiting
            if idle or last or work.finished - told >= self._batch:
                self._deliver(finished)
                finished, told = [], work.finished
            del work  # the thread keeps nobody's job while it waits

    def _latest(self, now: float) -> Work:
        latest, first = -math.inf, None
        for owner, works in self._waiting.items():
            lateness = (now - works[0].deadline) / works[0].allowance
            if first is None or lateness > latest:
                latest, first = lateness, owner
        works = self._waiting[first]
        work = works.popleft()
        if not works:
            del self._waiting[first]
        return work

    def _note_behind(self, work: Work) -> None:
        for owner in self._waiting:
            if owner != work.owner:
                self._behind[owner] = self._behind.get(owner, 0.0) + work.seconds

    def _do(self, work: Work) -> None:
        start = time.thread_time()
        try:
            work.run()
        except Exception as error:
            work.error = error
        work.seconds = time.thread_time() - start
        work.finished = time.monotonic()
        self.busy += work.seconds
