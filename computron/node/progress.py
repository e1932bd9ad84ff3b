"""How far the loading of models is."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called from loading threads with (model id, bytes loaded, bytes in all)."""


class LoadProgress:
    """Of one model: called with the bytes that have been loaded since the last time."""

    def __init__(self, progress: Progress, model: str, total: int) -> None:
        self._progress = progress
        self._model = model
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._model, self._done, self._total)
