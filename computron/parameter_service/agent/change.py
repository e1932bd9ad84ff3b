"""Waiting for what other threads bring about."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Change:
    """A lock, to be held while something changes. Who waits is woken only when what it waits for has come about: a step
    brings dozens of changes, and waking a thread takes longer than most of them.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._awaited: list[Callable[[], bool]] = []

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._condition.__exit__(kind, error, trace)

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether it is true, at the latest after these seconds. The lock is held, but not while it waits; `done` is
        also called by whoever tells of a change, with the lock held.
        """
        self._awaited.append(done)
        try:
            return self._condition.wait_for(done, seconds)
        finally:
            self._awaited.remove(done)

    def tell(self) -> None:
        """Something has changed. The lock is held."""
        if any(done() for done in self._awaited):
            self._condition.notify_all()
