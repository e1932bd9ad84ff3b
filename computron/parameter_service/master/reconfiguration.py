"""One procedure for whatever happens to a job: workers come, leave or die, aggregators die or cannot be reached, the
master was away.

1. The epoch rises and `Hold` goes to all who may have blocks. Who does not answer in time counts as lost.
2. Each block is somewhere, at the last step S that any has seen or at the one before: those before it are completed
   with the commits that are there, and all stay where they are. Or some block is nowhere: the job is rolled back to its
   last complete snapshot, and its blocks are placed anew.
3. All blocks being ready, the members hear of the placement.

A step needs the commits of all members, and a worker follows one epoch only. So blocks are taken from an aggregator
that cannot be asked only if it is known to be dead, or if a member of the old epoch follows the new one or is certainly
dead: then the old owner can never apply a step again. When neither holds, everything waits until somebody is back. The
same is asked again at every later reconfiguration, until the old owner has come back or that member has made a step in
a newer epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from computron.parameter_service.master.files import discard_unfinished, first_limit, newest, note_extras
from computron.parameter_service.master.findings import best, commits_of, is_followed, nobody_finds, silent
from computron.parameter_service.master.loading import bringers, look_for_loaded
from computron.parameter_service.master.placement import Placer
from computron.parameter_service.master.reasons import (
    enough,
    look_for_doubts,
    look_for_idleness,
    look_for_members,
    may_begin_anew,
    reason_to_begin,
    unhost,
    why_nothing_is_left,
)
from computron.parameter_service.master.records import (
    EpochBegun,
    JobFailed,
    MemberGone,
    Placed,
    RolledBack,
    SnapshotBad,
)
from computron.parameter_service.master.state import Change, Job, Phase, State, Worker
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.messages import (
    FRESH,
    KEEP,
    Complete,
    Drop,
    Failed,
    Held,
    Hold,
    Host,
    Placement,
    Ready,
)

log = logging.getLogger(__name__)


class Reconfiguration:
    def __init__(self, state: State, placer: Placer) -> None:
        self._state = state
        self._placer = placer

    # What happens to jobs.

    def advance(self, job: Job, now: float) -> None:
        """Do for the job what is due. To be called after every event that concerns it, and as time passes."""
        if job.failed is not None:
            return
        look_for_members(self._state, job, now)
        look_for_doubts(self._state, job, now)
        for name in [name for name, until in job.excluded.items() if now >= until and job.change is None]:
            del job.excluded[name]
        change = job.change
        if change is not None:
            self._go_on(job, change, now)
        elif job.book.placed is None:
            if len(job.linked) >= job.book.spec.workers:
                self._begin(job, "the job starts", now)
        else:
            reason = reason_to_begin(self._state, job, now)
            if reason is not None:
                self._begin(job, reason, now)
            look_for_loaded(self._state, job)
            look_for_idleness(self._state, job, now)

    def held(self, job: Job, aggregator: str, message: Held, now: float) -> None:
        change = job.change
        if change is None or message.epoch != change.epoch or change.phase is not Phase.COLLECTING:
            return
        change.held[aggregator] = message
        change.awaited.discard(aggregator)

    def ready(self, job: Job, aggregator: str, message: Ready) -> None:
        change = job.change
        if change is None or message.epoch != change.epoch:
            return
        if change.phase not in (Phase.COMPLETING, Phase.HOSTING):
            return
        for state in message.blocks:
            ours = state.block in change.waiting and change.owners[state.block] == aggregator
            if ours and state.applied == change.applied:
                change.waiting.discard(state.block)

    def failed(self, job: Job, aggregator: str, message: Failed, now: float) -> None:
        """An order of this reconfiguration could not be carried out there: begin again without it."""
        change = job.change
        if message.epoch != job.book.epoch or (change is None and not self._is_placed(job, message)):
            return
        log.warning(
            "order_failed job=%s aggregator=%s order=%s reason=%s",
            job.name, aggregator, message.order, message.message,
        )  # fmt: skip
        if change is None:
            job.unbrought = True
        if message.order == "find":
            job.missing.add(aggregator)
        unfound = message.order == "find" and nobody_finds(self._state, job, now)
        if change is not None and (message.order == "restore" or unfound):
            self._state.write(SnapshotBad(job.name, change.source))
            job.readmit(job.missing)
            job.missing.clear()
        else:
            self._exclude(job, [aggregator], now)
        self._begin(job, f"{aggregator} failed: {message.message}", now)

    def _is_placed(self, job: Job, message: Failed) -> bool:
        """Whether it is of the last placement, which a worker is to bring the parameters for: nobody waited for it."""
        placed = job.book.placed
        return placed is not None and placed.epoch == message.epoch and message.order == "host"

    def aggregator_back(self, job: Job, aggregator: str, now: float) -> None:
        """It has registered, and may have blocks of the job. What it was ordered meanwhile it may not have heard."""
        change = job.change
        if change is None:
            return
        if change.phase is Phase.COLLECTING:
            change.awaited.add(aggregator)
            self._state.tell(aggregator, Hold(job.name, change.epoch))
        elif any(change.owners[block] == aggregator for block in change.waiting):
            self._begin(job, f"{aggregator} was away", now)

    def aggregator_gone(self, job: Job, aggregator: str, now: float) -> None:
        """It is dead."""
        change = job.change
        if change is None:
            return
        if change.phase is Phase.COLLECTING:
            change.awaited.discard(aggregator)
            change.held.pop(aggregator, None)
        elif aggregator in change.owners:
            self._begin(job, f"{aggregator} died", now)

    def placement(self, job: Job, worker: Worker) -> None:
        """Tell the worker what holds, if it is a member and nothing is changing."""
        placed = job.book.placed
        if job.change is not None or placed is None or placed.epoch != job.book.epoch:
            return
        members = job.book.members
        if members.get(worker.rank) not in ("", worker.incarnation) or worker.rank not in members:
            return
        names = sorted(set(placed.owners))
        addresses = [self._state.aggregators[name].address for name in names if name in self._state.aggregators]
        known = tuple(address for address in addresses if address is not None)
        if len(known) < len(names):
            return  # an owner has died: another placement is about to come
        self._state.send(
            worker.link,
            Placement(
                job=job.name,
                epoch=placed.epoch,
                rank=worker.rank,
                members=tuple(sorted(members)),
                owners=tuple(names.index(owner) for owner in placed.owners),
                addresses=known,
                applied=placed.applied,
                lost=placed.lost,
                initialise=placed.initialise == worker.rank,
                reason=placed.reason,
                loads=placed.loads,
                loading=placed.loads > job.book.loaded,
            ),
        )

    def _exclude(self, job: Job, aggregators: Iterable[str], now: float, *, silent: bool = False) -> None:
        job.exclude(aggregators, now + self._state.limits.exclusion, silent=silent)

    # 1. Hold.

    def _begin(self, job: Job, reason: str, now: float) -> None:
        state = self._state
        epoch = job.book.epoch + 1
        state.write(EpochBegun(job.name, epoch))
        state.reconfigurations += 1
        job.doubted.clear()
        job.mismatch, job.broken = False, ""
        change = job.change = Change(epoch, reason, now + state.limits.hold)
        log.info("reconfiguration job=%s epoch=%d reason=%s", job.name, epoch, reason)
        if job.book.placed is None:
            self._restore(job, change, now)
            return
        for name in sorted(job.holders):
            if name in state.aggregators and (name not in job.excluded or state.is_linked(name)):
                change.awaited.add(name)
                state.tell(name, Hold(job.name, epoch))
        self._go_on(job, change, now)

    def _go_on(self, job: Job, change: Change, now: float) -> None:
        if change.phase is Phase.COLLECTING:
            if change.awaited and now < change.deadline:
                return
            if not self._may_abandon(job, change):
                return
            for name in change.awaited:
                log.warning("aggregator_silent job=%s aggregator=%s", job.name, name)
            self._exclude(job, change.awaited, now, silent=True)
            self._decide(job, change, now)
        elif change.phase is Phase.PLACING:
            self._place(job, change, now)
        elif not change.waiting:
            if change.phase is Phase.COMPLETING:
                self._host(job, change, now)
            else:
                self._finish(job, change)
        elif now >= change.deadline:
            self._exclude(job, {change.owners[block] for block in change.waiting}, now, silent=True)
            self._begin(job, f"{change.owners[min(change.waiting)]} did not get ready", now)

    def _may_abandon(self, job: Job, change: Change) -> bool:
        """Whether those who have not answered can never apply a step again."""
        return all(is_followed(job, members) for members in silent(self._state, job, change).values())

    # 2. Decide.

    def _decide(self, job: Job, change: Change, now: float) -> None:
        useless = job.excluded.keys() - job.silent
        found = best(job, {name: held for name, held in change.held.items() if name not in useless})
        for held in change.held.values():
            for block in held.blocks:
                job.saw(block.applied, now)
        if bringers(job):
            self._load(job, change, found, now)
            return
        if len(found) < len(job.layout.blocks):
            self._restore(job, change, now)
            return
        applied = max(step for step, _ in found.values())
        behind = {block for block, (step, _) in found.items() if step < applied}
        commits = commits_of(change, applied, set(job.book.members))
        if any(found[block][0] != applied - 1 for block in behind) or (behind and commits is None):
            self._restore(job, change, now)
            return
        change.owners = [found[block][1] for block in range(len(found))]
        change.applied = applied
        change.source = KEEP
        job.readmit(change.owners)
        if not behind or commits is None:
            self._host(job, change, now)
            return
        change.phase = Phase.COMPLETING
        change.waiting = behind
        change.deadline = now + self._state.limits.hold
        for name in sorted({change.owners[block] for block in behind}):
            blocks = tuple(sorted(block for block in behind if change.owners[block] == name))
            self._state.tell(name, Complete(job.name, change.epoch, applied, blocks, commits))

    def _load(self, job: Job, change: Change, found: dict[int, tuple[int, str]], now: float) -> None:
        """Go on from a state that workers have, at the step that they are in."""
        change.loads, change.source = job.book.loaded + 1, FRESH
        change.applied = max(worker.load.step for worker in bringers(job) if worker.load is not None)
        if len(found) < len(job.layout.blocks):
            self._place(job, change, now)
            return
        change.owners = [found[block][1] for block in range(len(found))]
        job.readmit(change.owners)
        self._host(job, change, now)

    def _restore(self, job: Job, change: Change, now: float) -> None:
        """Go on from the last complete snapshot, or from the beginning where nothing is lost by that."""
        change.owners = []
        snapshot = newest(job)
        if snapshot is not None:
            change.source, change.applied = snapshot.path, snapshot.step
            change.lost = max(0, job.step - snapshot.step)
        elif may_begin_anew(job, change):
            change.source, change.applied = FRESH, job.step
        else:
            self.fail(job, f"{change.reason}, {why_nothing_is_left(job)}")
            return
        self._place(job, change, now)

    def _place(self, job: Job, change: Change, now: float) -> None:
        owners = self._placer.place(self._state, job, self._state.usable(job))
        if owners is None:
            if change.phase is not Phase.PLACING:
                change.phase, change.deadline = Phase.PLACING, now + self._state.limits.hold
            elif now >= change.deadline and any(self._state.is_linked(name) for name in job.excluded):
                job.excluded.clear()  # there is nobody else: perhaps it has recovered, and still has everything
                self._begin(job, change.reason, now)
            return
        change.owners = owners
        self._host(job, change, now)

    def fail(self, job: Job, message: str) -> None:
        log.error("job_failed job=%s reason=%s", job.name, message)
        self._state.write(JobFailed(job.name, message))
        job.change = None
        unhost(self._state, job)
        discard_unfinished(self._state, job)
        for worker in job.linked:
            self._state.dismiss(worker.link, job.name, refusals.FAILED, message)
        job.workers.clear()

    # 3. Host, and go on.

    def _host(self, job: Job, change: Change, now: float) -> None:
        state = self._state
        if not enough(job):
            change.phase = Phase.COLLECTING  # too few are there to go on: decided again when others are
            job.change = None
            return
        if change.loads and not bringers(job):
            self._begin(job, "nobody is left of those who loaded a state", now)
            return
        change.members = {worker.rank: worker.incarnation for worker in job.workers.values()}
        change.phase = Phase.HOSTING
        if change.source != KEEP:
            job.trouble, job.trouble_step = "", 0  # a snapshot is tried again before the first limit
            discard_unfinished(state, job, -1 if change.loads else change.applied)
            if not change.loads:
                state.write(RolledBack(job.name, change.epoch, change.applied))
        change.waiting = set() if change.source == FRESH else set(range(len(change.owners)))
        size = sum(block.nbytes for block in job.layout.blocks)
        reading = 0.0 if change.source == KEEP else 3 * size / state.limits.read_rate
        change.deadline = now + state.limits.hold + reading
        owners = set(change.owners)
        for name in sorted(owners):
            blocks = tuple(block for block, owner in enumerate(change.owners) if owner == name)
            state.tell(name, Host(
                spec=job.book.spec,
                token=job.book.token,
                epoch=change.epoch,
                members=tuple(sorted(change.members)),
                blocks=blocks,
                applied=change.applied,
                source=change.source,
                kept=first_limit(job, change),
                history=job.book.history,
            ))  # fmt: skip
        for name in sorted(job.holders - owners):
            state.tell(name, Drop(job.name))
        job.hosts = owners
        if not change.waiting:
            self._finish(job, change)  # the worker that brings the parameters needs its placement for that

    def _finish(self, job: Job, change: Change) -> None:
        rolled_back = change.source != KEEP
        bringing = bringers(job) if change.loads else job.linked
        first = min([worker.rank for worker in bringing] or change.members)
        initialise = first if change.source == FRESH else None
        unheard = silent(self._state, job, change) if job.book.placed is not None else {}
        unfenced = sorted((name, members) for name, members in unheard.items() if name not in change.owners)
        note_extras(job, change)
        self._state.write(Placed(
            job=job.name,
            epoch=change.epoch,
            members=tuple(sorted(change.members.items())),
            owners=tuple(change.owners),
            applied=change.applied,
            lost=change.lost,
            initialise=initialise,
            reason=change.reason,
            unfenced=tuple(unfenced),
            loads=change.loads or job.book.loaded,  # who still wants one that is not done says so again
        ))  # fmt: skip
        job.fenced.clear()
        for rank, incarnation in change.members.items():
            worker = job.workers.get(rank)
            if worker is None or worker.incarnation != incarnation:  # it has gone meanwhile
                self._state.write(MemberGone(job.name, rank, False))
        if rolled_back:
            self._state.rollbacks += job.step > 0 and not change.loads
            if change.lost:
                log.warning("rolled_back job=%s to_step=%d lost=%d", job.name, change.applied, change.lost)
        job.step = change.applied
        job.change = None
        job.missing.clear()
        job.mismatch_of_log = job.unbrought = False
        log.info(
            "placed job=%s epoch=%d members=%d step=%d reason=%s",
            job.name, change.epoch, len(change.members), change.applied, change.reason,
        )  # fmt: skip
        for worker in job.linked:
            self.placement(job, worker)
