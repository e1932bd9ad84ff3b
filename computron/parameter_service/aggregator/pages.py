"""Pages of blocks' memory: they are mapped before a step wants them, made huge while steps go on, and given back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import PriorityQueue

from computron.parameter_service.wire.segments import HUGE_PAGE, Segment

log = logging.getLogger(__name__)

LEAST_PRIORITY = 19
REST = 3.0  # times as long as it has worked
SOON, SOME_TIME = range(2)


class Pages:
    """A thread that takes only what cores the others leave, and rests most of the time: what is computed meanwhile
    needs the same memory.
    """

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[int, int, Callable[[], object] | None]] = PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._run, name="pages")
        self._thread.start()

    def close(self) -> None:
        """What has not been done is not done any more."""
        self._put(None, SOON - 1)
        self._thread.join()

    def touch(self, segments: Sequence[Segment], then: Callable[[], None]) -> None:
        """Have all their pages mapped; `then` is called by the event loop when they are."""
        loop = asyncio.get_running_loop()
        for segment in segments:
            self._put(segment.touch)
        self._put(lambda: loop.call_soon_threadsafe(then))

    def release(self, close: Callable[[], None]) -> None:
        """Call it here: with the last reference to a segment its pages are given back, which takes time, too."""
        self._put(close)

    def enlarge(self, segments: Sequence[Segment]) -> None:
        """Make their pages huge while somebody has them: the optimizer goes through memory faster then, and mapping it
        elsewhere takes a fraction of the time.
        """
        for segment in segments:
            self._put(partial(self._enlarge, weakref.ref(segment), 0), SOME_TIME)

    def _enlarge(self, known: weakref.ref[Segment], offset: int) -> None:
        segment = known()
        if segment is None or offset + HUGE_PAGE > segment.nbytes:
            return
        if not segment.enlarge(offset) and not offset:
            return  # this machine has none, or none left
        self._put(partial(self._enlarge, known, offset + HUGE_PAGE), SOME_TIME)

    def _put(self, work: Callable[[], object] | None, urgency: int = SOON) -> None:
        self._queue.put((urgency, next(self._order), work))

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
        while (work := self._queue.get()[2]) is not None:
            began = time.monotonic()
            try:
                work()
            except Exception:
                log.exception("pages of a block could not be prepared or given back")
            del work  # the thread keeps nobody's memory while it waits
            time.sleep(REST * (time.monotonic() - began))
