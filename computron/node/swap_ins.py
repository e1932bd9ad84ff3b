"""What is told of swap-ins, each of which may come in several pieces."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from computron.memory.swap import SwapOutcome
from computron.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Coming:
    """What came of a model since it was last complete. `hidden`: seconds in which the device computed."""

    pieces: int = 0
    pages: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    hidden: float = 0.0


class SwapIns:
    """Counts the pieces, and the swap-ins that they make. A line at level info tells of a whole one."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._coming: dict[str, _Coming] = {}

    def arrived(self, outcome: SwapOutcome, hidden_ratio: float, *, complete: bool) -> None:
        """A piece is there. `complete`: so is all of its model now."""
        model = outcome.image_id
        self._metrics.swap_finished(model, outcome.seconds, hidden_ratio, outcome.bytes_moved)
        coming = self._coming.setdefault(model, _Coming())
        coming.pieces += 1
        coming.pages += len(outcome.pages)
        coming.nbytes += outcome.bytes_moved
        coming.seconds += outcome.seconds
        coming.hidden += hidden_ratio * outcome.seconds
        if not complete:
            pages, nbytes, seconds = len(outcome.pages), outcome.bytes_moved, outcome.seconds
            log.debug("swap_in_piece model=%s pages=%d bytes=%d seconds=%.4f", model, pages, nbytes, seconds)
            return
        del self._coming[model]
        self._metrics.swap_in_completed(model)
        hidden = coming.hidden / coming.seconds if coming.seconds else 1.0
        log.info(
            "swap_in model=%s pages=%d bytes=%d seconds=%.4f hidden=%.2f pieces=%d",
            model, coming.pages, coming.nbytes, coming.seconds, hidden, coming.pieces,
        )  # fmt: skip

    def forget(self) -> None:
        """The device is empty."""
        self._coming.clear()
