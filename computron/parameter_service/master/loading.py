"""States that workers load into a job: one of them brings it, in an epoch of its own. Until no failure can lose what
was loaded, all of them keep it: it can be brought again. Then nothing that was saved in an older epoch counts any more.
"""

from __future__ import annotations

from pathlib import Path

from computron.parameter_service.master.records import NOTHING, RolledBack, StateLoaded
from computron.parameter_service.master.state import Job, State, Worker
from computron.parameter_service.versions.names import begun_of
from computron.parameter_service.wire.messages import Loaded


def may_load(job: Job) -> bool:
    """Whether an epoch is to begin because all members want the next load, between the same two steps."""
    placed, members = job.book.placed, job.book.members
    if placed is None or job.book.loads > job.book.loaded:
        return False
    asking = {worker.rank for worker in bringers(job) if worker.load is not None and worker.load.epoch == placed.epoch}
    return asking == set(members)


def bringers(job: Job) -> list[Worker]:
    """Who can bring the state that is being loaded or to be loaded next: none unless all members want that, or it has
    begun.
    """
    number = job.book.loaded + 1
    found = [worker for worker in job.linked if worker.load is not None and worker.load.number == number]
    found = [worker for worker in found if worker.rank in job.book.members]
    begun = job.book.loads == number
    return found if begun or {worker.rank for worker in found} == set(job.book.members) else []


def look_for_loaded(state: State, job: Job) -> None:
    """All blocks are there, and a snapshot of them if one can be taken: the load is done."""
    book = job.book
    placed = book.placed
    if placed is None or job.change is not None or book.loads == book.loaded:
        return
    loads = [worker.load for worker in bringers(job)]
    if not any(load is not None and load.ready and load.epoch == placed.epoch for load in loads):
        return
    epochs = [begun[1] for saved in book.snapshots if (begun := begun_of(Path(saved.path))) is not None]
    if book.spec.snapshot_every and not job.trouble and max(epochs, default=0) < placed.epoch:
        return
    state.write(RolledBack(job.name, placed.epoch, NOTHING))
    state.write(StateLoaded(job.name, book.loads))
    for worker in job.linked:
        state.send(worker.link, Loaded(job.name, book.loaded))
