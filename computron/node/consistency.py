"""Whether this node's memory and the scheduler agree."""

from __future__ import annotations

from computron.node.crew import Crew
from computron.scheduling.scheduler import Scheduler


def check(crew: Crew, scheduler: Scheduler) -> None:
    """As `Node.check`."""
    worker, alone = crew.worker, crew.peers is None
    worker.swapper.check()
    worker.store.check()
    scheduler.check()
    if alone:
        assert worker.swapper.free_frames == scheduler.free_frames
    for model, held in worker.models.items():
        resident = len(worker.swapper.resident_pages(model))
        if alone:
            assert resident == round(scheduler.resident_fraction(model) * len(held.image.pages)) or not resident
        assert worker.swapper.cache_frames(model) <= scheduler.cache_frames(model)
