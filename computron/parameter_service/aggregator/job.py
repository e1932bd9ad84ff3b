"""What an aggregator knows of one job, and what follows from it. No I/O: others carry it out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from computron.parameter_service.aggregator.block import HeldBlock
from computron.parameter_service.aggregator.staging import PushedStaging, Staging, missing
from computron.parameter_service.layout import Layout
from computron.parameter_service.packing.loads import LEAST_ALLOWANCE
from computron.parameter_service.specs import block_bytes, gradient_bytes
from computron.parameter_service.wire.link import Link
from computron.parameter_service.wire.messages import Address, AskNorms, Commit, HeldCommit, JobSpec
from computron.parameter_service.wire.segments import Segment

SMOOTHING = 0.1  # of measured times: the weight of the newest


@dataclass(eq=False)
class Worker:
    """A member that has joined here."""

    rank: int
    incarnation: str
    link: Link
    staging: Staging


@dataclass(eq=False)
class Committed:
    """What one member's commits of one step said so far. blocks: None for all."""

    said: HeldCommit
    blocks: set[int] | None

    def covers(self, block: int, step: int) -> bool:
        return self.said.step == step and (self.blocks is None or block in self.blocks)


@dataclass
class Counters:
    """Since the last report."""

    cpu: float = 0.0
    late: float = 0.0
    steps: int = 0
    network: int = 0


@dataclass(eq=False)
class Job:
    """held: nothing is applied but what the master asks for. expected: blocks that will be handed over to here;
    arriving: memory for them.

    leaving: blocks that were announced to be elsewhere, and are kept until they are; given: all that were in this
    epoch, after which step and to whom. kept: step of the last complete snapshot, None while none can be written.
    history: as in `Saved`. master_away: nobody says so any more. trouble: why no snapshot can be written here. asks:
    the last of each member; unanswered: those that came after the last answer.
    """

    spec: JobSpec
    token: str
    epoch: int
    members: tuple[int, ...]
    layout: Layout
    held: bool = False
    blocks: dict[int, HeldBlock] = field(default_factory=dict)
    expected: set[int] = field(default_factory=set)
    arriving: dict[int, Segment] = field(default_factory=dict)
    leaving: dict[int, HeldBlock] = field(default_factory=dict)
    given: dict[int, tuple[int, Address]] = field(default_factory=dict)
    workers: dict[int, Worker] = field(default_factory=dict)
    commits: dict[int, Committed] = field(default_factory=dict)
    asks: dict[int, AskNorms] = field(default_factory=dict)
    unanswered: set[int] = field(default_factory=set)
    counters: Counters = field(default_factory=Counters)
    block_seconds: dict[int, float] = field(default_factory=dict)
    block_lasts: dict[int, float] = field(default_factory=dict)
    kept: int | None = 0
    history: int = 0
    master_away: bool = False
    trouble: str = ""
    period: float = 0.0
    last_commit: float = 0.0

    def commit(self, rank: int, commit: Commit) -> None:
        """Take down what a member commits; a repeated commit changes nothing."""
        blocks = None if commit.blocks is None else set(commit.blocks)
        known = self.commits.get(rank)
        if known is not None and known.said.step > commit.step:
            return
        if known is not None and known.said.step == commit.step:
            known.blocks = None if known.blocks is None or blocks is None else known.blocks | blocks
            if commit.version is not None and known.said.version is None:
                known.said = said(rank, commit)
            return
        self.commits[rank] = Committed(said(rank, commit), blocks)
        if rank == self.members[0]:
            self._time(time.monotonic())

    def ready(self, among: Iterable[int] | None = None) -> list[HeldBlock]:
        """Blocks whose next step all members have committed, in the order of the forward pass."""
        if self.held or any(rank not in self.commits for rank in self.members):
            return []
        commits = [self.commits[rank] for rank in self.members]
        found = []
        for index in sorted(self.blocks if among is None else among):
            block = self.blocks.get(index)
            if block is None or not block.complete or block.scheduled:
                continue
            step = block.applied + 1
            if step > self.last_allowed(block):
                continue
            if all(commit.covers(index, step) for commit in commits) and self._staged(block, step):
                found.append(block)
        return found

    def last_allowed(self, block: HeldBlock) -> float:
        """The last step that may be applied to the block now, so that a failure costs no more than the job allows.

        1. The master says which snapshot is complete: no further behind that.
        2. The master is away: no further behind what a snapshot has of this block, and a step less, because other
           blocks, which keep to the same, may be a step behind this one.
        3. Nothing can be saved, here or elsewhere: no limit. That has been told.
        """
        every = self.spec.snapshot_every
        if not every or self.kept is None:
            return math.inf
        if not self.master_away:
            return self.kept + every
        return max(self.kept, block.saved) + max(1, every - 1)

    @property
    def snapshot_stride(self) -> int:
        """Steps from one to the next: twice as often as they may be lost, as they go on while one is being written."""
        return max(1, self.spec.snapshot_every // 2)

    def wants_snapshot(self, step: int) -> bool:
        return self.spec.snapshot_every > 0 and step % self.snapshot_stride == 0

    def free_to_move(self, block: HeldBlock) -> bool:
        """Nobody has pushed, committed or asked anything of its next step, and no file wants its state.

        Who has the norms of a step asks for none again: so what was asked is answered by who has the block now.
        """
        if not block.complete or block.scheduled or block.wanted or self.held:
            return False
        step = block.applied + 1
        if any(worker.staging.staged(block.block) == step for worker in self.workers.values()):
            return False
        if any(ask.step == step for ask in self.asks.values()):
            return False
        return not any(commit.covers(block.block.index, step) for commit in self.commits.values())

    def _staged(self, block: HeldBlock, step: int) -> bool:
        """Whether all gradients that the step needs are here."""
        if any(self.commits[rank].said.skip for rank in self.members):
            return True
        return not missing({rank: self.workers[rank].staging for rank in self.members}, block.block, step)

    def ask(self, rank: int, ask: AskNorms) -> None:
        self.asks[rank] = ask
        self.unanswered.add(rank)

    def asked_norms(self) -> list[AskNorms]:
        """All members' questions, once all have asked the same and every block here has what it takes to answer."""
        asks = [self.asks[rank] for rank in self.members if rank in self.asks]
        if not self.unanswered or len(asks) < len(self.members) or len({(ask.step, ask.time) for ask in asks}) > 1:
            return []
        stagings = {rank: self.workers[rank].staging for rank in self.members}
        for block in self.blocks.values():
            if not block.complete or block.applied != asks[0].step - 1:
                return []
            if missing(stagings, block.block, asks[0].step):
                return []
        return asks

    @property
    def pushing(self) -> int:
        """How many members push their gradients to here."""
        return sum(isinstance(worker.staging, PushedStaging) for worker in self.workers.values())

    def state_bytes(self, blocks: Iterable[int]) -> int:
        return sum(block_bytes(self.spec, self.layout.blocks[index]) for index in blocks)

    def gradient_bytes(self, blocks: Iterable[int]) -> int:
        """Of one worker."""
        return sum(gradient_bytes(self.spec, self.layout.blocks[index]) for index in blocks)

    def forget_asks(self) -> None:
        self.asks.clear()
        self.unanswered.clear()

    def expect_nothing(self) -> None:
        for segment in self.arriving.values():
            segment.close()
        self.arriving, self.expected = {}, set()

    def lately(self) -> tuple[HeldCommit, ...]:
        return tuple(commit.said for commit in self.commits.values())

    def lasts(self, block: int) -> float:
        """Seconds that a step of this block takes here, as long as it has a core or waits for one."""
        return self.block_lasts.get(block, 0.0)

    def allowance(self) -> float:
        """Seconds that its limit lets others take of a step."""
        return max(LEAST_ALLOWANCE, self.spec.loss_limit * self.period)

    def note_seconds(self, block: int, seconds: float, lasted: float) -> None:
        """Of CPU time, and in all."""
        for known, value in ((self.block_seconds, seconds), (self.block_lasts, lasted)):
            before = known.get(block)
            known[block] = value if before is None else before + SMOOTHING * (value - before)
        self.counters.cpu += seconds

    def _time(self, now: float) -> None:
        if self.last_commit:
            lasted = now - self.last_commit
            self.period += (SMOOTHING if self.period else 1.0) * (lasted - self.period)
            self.counters.steps += 1
        self.last_commit = now


def said(rank: int, commit: Commit) -> HeldCommit:
    return HeldCommit(rank, commit.step, commit.groups, commit.scale, commit.skip, commit.version)


def versions_of(commits: Iterable[HeldCommit]) -> list[str]:
    """Names of the versions that the parameters become after a step that was committed so."""
    return sorted({commit.version for commit in commits if commit.version is not None})
