"""What people ask of the master."""

from __future__ import annotations

from computron.errors import BadRequest, ComputronError
from computron.parameter_service.master.events import (
    Asked,
    CountAsked,
    DrainAsked,
    DropAsked,
    MoveAsked,
    QuotaAsked,
)
from computron.parameter_service.master.files import discard_unfinished
from computron.parameter_service.master.moves import Moves
from computron.parameter_service.master.records import CountSet, JobDropped, QuotaSet
from computron.parameter_service.master.scaling import Scaling
from computron.parameter_service.master.state import Job, State
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.messages import Drop


class NotFound(ComputronError):
    """No job or aggregator of that name."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Requests:
    def __init__(self, state: State, moves: Moves, scaling: Scaling) -> None:
        self._state = state
        self._moves = moves
        self._scaling = scaling

    def handle(self, event: Asked, now: float) -> None:
        match event:
            case MoveAsked():
                self._move(self._job(event.job), event, now)
            case DrainAsked():
                self._drain(event.aggregator)
            case DropAsked():
                self._drop(self._job(event.job))
            case QuotaAsked():
                self._state.write(QuotaSet(event.job, event.memory))
            case CountAsked():
                if not 0 <= event.count <= self._scaling.settings.maximum:
                    raise BadRequest(f"between 0 and {self._scaling.settings.maximum} aggregators can be asked for")
                self._state.write(CountSet(event.count))

    def _job(self, name: str) -> Job:
        job = self._state.jobs.get(name)
        if job is None:
            raise NotFound(f"there is no job {name}")
        return job

    def _move(self, job: Job, event: MoveAsked, now: float) -> None:
        if not self._state.is_linked(event.to):
            raise NotFound(f"no aggregator {event.to} is connected")
        count = len(job.layout.blocks)
        blocks = range(count) if event.blocks is None else event.blocks
        wrong = [block for block in blocks if not 0 <= block < count]
        if wrong:
            raise BadRequest(f"job {job.name} has blocks 0 to {count - 1}, not {wrong[0]}", param="blocks")
        if job.failed is not None:
            raise BadRequest(f"job {job.name} has failed: {job.failed}")
        if job.change is not None or job.book.placed is None:
            raise BadRequest(f"job {job.name} is being placed; ask again in a second")
        self._moves.order(job, blocks, event.to, now)

    def _drain(self, name: str) -> None:
        known = self._state.aggregators.get(name)
        if known is None:
            raise NotFound(f"there is no aggregator {name}")
        others = [a for a in self._state.aggregators.values() if a.id != name and a.link is not None and not a.draining]
        if not others:
            raise BadRequest(f"{name} is the only aggregator: start another one first")
        known.draining = True

    def _drop(self, job: Job) -> None:
        for name in sorted(job.holders):
            self._state.tell(name, Drop(job.name))
        for worker in job.linked:
            self._state.dismiss(worker.link, job.name, refusals.UNKNOWN_JOB, "the job was deleted")
        discard_unfinished(self._state, job)
        del self._state.jobs[job.name]
        self._state.write(JobDropped(job.name))
