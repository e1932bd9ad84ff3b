"""What people ask of the master."""

from __future__ import annotations

from collections.abc import Iterable

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


MOST_NAMES = 20  # that an answer lists


def no_job(state: State, name: str) -> NotFound:
    return NotFound(f"there is no job {name}; {_there_are('jobs', state.jobs)}")


def no_aggregator(state: State, name: str) -> NotFound:
    return NotFound(f"there is no aggregator {name}; {_there_are('aggregators', state.aggregators)}")


def _there_are(what: str, names: Iterable[str]) -> str:
    known = sorted(names)
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return f"the {what} are {', '.join(known[:MOST_NAMES])}{more}" if known else f"there are no {what}"


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
            raise no_job(self._state, name)
        return job

    def _move(self, job: Job, event: MoveAsked, now: float) -> None:
        if event.to not in self._state.aggregators:
            raise no_aggregator(self._state, event.to)
        if not self._state.is_linked(event.to):
            raise BadRequest(f"aggregator {event.to} is not connected now", param="to")
        count = len(job.layout.blocks)
        blocks = range(count) if event.blocks is None else event.blocks
        wrong = [block for block in blocks if not 0 <= block < count]
        if wrong:
            raise BadRequest(f"job {job.name} has blocks 0 to {count - 1}, not {wrong[0]}", param="blocks")
        if job.failed is not None:
            raise BadRequest(f"job {job.name} has failed: {job.failed}")
        if job.book.placed is None:
            raise BadRequest(f"job {job.name} waits for its workers, and is in no aggregator's memory")
        if job.change is not None:
            raise BadRequest(f"job {job.name} is being placed; ask again in a second")
        if not any(map(self._state.is_linked, job.book.owners)):
            raise BadRequest(f"job {job.name} is in no aggregator's memory; it comes back when a worker does")
        ordered = self._moves.order(job, blocks, event.to, now)
        if not ordered and any(job.book.owners[b] != event.to and job.book.moving.get(b) != event.to for b in blocks):
            raise BadRequest(f"nothing of job {job.name} can be moved now; ask again in a few seconds")

    def _drain(self, name: str) -> None:
        known = self._state.aggregators.get(name)
        if known is None:
            raise no_aggregator(self._state, name)
        others = [a for a in self._state.aggregators.values() if a.id != name and a.link is not None and not a.draining]
        if not others:
            raise BadRequest(
                f"no other aggregator could take what {name} has: start another one, or ask the master for more, first"
            )
        known.draining = True

    def _drop(self, job: Job) -> None:
        for name in sorted(job.holders):
            self._state.tell(name, Drop(job.name))
        for worker in job.linked:
            self._state.dismiss(worker.link, job.name, refusals.UNKNOWN_JOB, "the job was deleted")
        discard_unfinished(self._state, job)
        del self._state.jobs[job.name]
        self._state.epochs[job.name] = job.book.epoch  # the book forgets it when many others have been deleted
        self._state.write(JobDropped(job.name))
