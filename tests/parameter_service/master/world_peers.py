"""Aggregators and workers of the small world: they hold no parameters, only what was applied to them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from computron.parameter_service.wire import messages as m
from tests.parameter_service.master.fakes import address_of, enlist

if TYPE_CHECKING:
    from tests.parameter_service.master.world import World

SNAPSHOT_EVERY = 3
BLOCKS = 3


@dataclass
class SimBlock:
    applied: int
    chain: tuple[Any, ...]
    complete: bool = True
    target: str | None = None  # announced to go there


@dataclass
class SimJob:
    epoch: int
    members: tuple[int, ...]
    blocks: dict[int, SimBlock]
    commits: dict[int, int] = field(default_factory=dict)
    held: bool = False
    history: int = 0


class SimPeer:
    """queue: what it has said and the master has not heard yet; inbox: the other way round."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.away_until = 0.0
        self.deaf = False
        self.alive = True
        self.link: int | None = None
        self.queue: deque[Any] = deque()
        self.inbox: deque[Any] = deque()

    def say(self, message: Any) -> None:
        if self.link is not None:
            self.queue.append(message)

    def connect(self) -> None:
        self.world.next_link += 1
        self.link = self.world.next_link
        self.queue.clear()
        self.inbox.clear()
        self.say(self.greeting())

    def greeting(self) -> Any:
        raise NotImplementedError


class SimAggregator(SimPeer):
    def __init__(self, world: World, name: str, pid: int) -> None:
        super().__init__(world)
        self.name = name
        self.pid = pid
        self.job: SimJob | None = None
        self.connect()

    def greeting(self) -> m.Register:
        jobs = ()
        if self.job is not None:
            jobs = (
                m.HostedJob(self.world.spec, "secret", self.job.epoch, self.job.members, self.states(), self.job.held),
            )
        return m.Register(address_of(self.name), "", self.pid, 1 << 30, jobs)

    def states(self) -> tuple[m.BlockState, ...]:
        assert self.job is not None
        return tuple(m.BlockState(n, b.applied) for n, b in sorted(self.job.blocks.items()) if b.complete)

    def receive(self, message: Any) -> None:
        match message:
            case m.Hold():
                self.hold(message)
            case m.Host():
                self.host(message)
            case m.Complete():
                self.complete(message)
            case m.Move():
                if self.job is not None and self.job.epoch == message.epoch and not self.job.held:
                    for block in message.blocks:
                        if block in self.job.blocks:
                            self.job.blocks[block].target = message.to.aggregator
            case m.Drop():
                self.job = None
            case m.Registered():
                if message.drop:
                    self.job = None

    def hold(self, message: m.Hold) -> None:
        job = self.job
        if job is None:
            self.say(m.Held("lm", message.epoch, (), ()))
            return
        job.epoch, job.held = max(job.epoch, message.epoch), True
        commits = tuple(m.HeldCommit(rank, step, (), 1.0, False, None) for rank, step in sorted(job.commits.items()))
        self.say(m.Held("lm", message.epoch, self.states(), commits, history=job.history))

    def host(self, message: m.Host) -> None:
        if self.job is not None and message.epoch < self.job.epoch:
            return
        old = self.job.blocks if self.job is not None else {}
        blocks: dict[int, SimBlock] = {}
        for block in message.blocks:
            if message.source == "keep":
                assert old[block].complete
                assert old[block].applied == message.applied
                blocks[block] = SimBlock(message.applied, old[block].chain)
            elif message.source == "worker":
                blocks[block] = SimBlock(message.applied, (), complete=False)
            else:
                blocks[block] = SimBlock(message.applied, self.world.files[message.source][block])
        history = self.job.history if self.job is not None else 0
        history = max(history, message.history) if message.source == "keep" else message.epoch
        self.job = SimJob(message.epoch, message.members, blocks, history=history)
        if message.source != "worker":
            self.say(m.Ready("lm", message.epoch, self.states()))

    def complete(self, message: m.Complete) -> None:
        if self.job is None or self.job.epoch != message.epoch:
            return
        ranks = tuple(sorted(commit.rank for commit in message.commits))
        for block in message.blocks:
            state = self.job.blocks[block]
            if state.applied == message.step - 1:
                self.apply(block, state, message.step, ranks)
        self.say(m.Ready("lm", message.epoch, self.states()))

    def commit(self, epoch: int, rank: int, step: int) -> None:
        job = self.job
        if job is None or job.epoch != epoch or job.held or rank not in job.members:
            return
        job.commits[rank] = step
        if any(job.commits.get(member) != step for member in job.members):
            return
        for number, block in job.blocks.items():
            if block.complete and block.target is None and block.applied == step - 1:
                self.world.check_apply(epoch, number, step)
                self.apply(number, block, step, job.members)

    def apply(self, number: int, block: SimBlock, step: int, members: tuple[int, ...]) -> None:
        assert self.job is not None
        block.applied, block.chain = step, (*block.chain, (step, members))
        if step % SNAPSHOT_EVERY == 0:
            self.save(number, block, step)

    def save(self, number: int, block: SimBlock, step: int) -> None:
        assert self.job is not None
        path = f"snapshot-{step}-{self.job.epoch}.safetensors"
        self.world.files.setdefault(path, {})[number] = block.chain
        self.say(m.Saved("lm", "", step, path, (number,)))

    def hand_over(self) -> None:
        """What was announced goes, where the other one can take it."""
        job = self.job
        if job is None or job.held:
            return
        for number, block in list(job.blocks.items()):
            other = self.world.aggregators.get(block.target or "")
            if other is None or other is self or not block.complete:
                continue
            theirs = other.job
            if theirs is not None and (theirs.epoch > job.epoch or (theirs.held and theirs.epoch == job.epoch)):
                continue
            if theirs is None or theirs.epoch < job.epoch:
                theirs = other.job = SimJob(job.epoch, job.members, {}, history=job.history)
            if number not in theirs.blocks:
                theirs.blocks[number] = SimBlock(block.applied, block.chain)
            else:  # accepted before: now it is known here
                del job.blocks[number]
                self.say(m.MovedOut("lm", job.epoch, (number,), other.name, block.applied))


class SimWorker(SimPeer):
    def __init__(self, world: World, rank: int, incarnation: str) -> None:
        super().__init__(world)
        self.rank, self.incarnation = rank, incarnation
        self.placement: m.Placement | None = None
        self.step = 0
        self.denied = False
        self.connect()

    def greeting(self) -> m.Enlist:
        return enlist(self.world.spec, self.rank, incarnation=self.incarnation)

    def receive(self, message: Any) -> None:
        if isinstance(message, m.Denied):
            self.denied = True
        elif isinstance(message, m.Placement) and (self.placement is None or message.epoch > self.placement.epoch):
            assert self.rank == message.rank
            self.placement, self.step = message, message.applied

    def work(self) -> None:
        """One look at how far the step is, and a commit where there is none yet."""
        placed = self.placement
        if placed is None or self.denied:
            return
        reached = [a for a in self.world.aggregators.values() if a.alive and (self.rank, a.name) not in self.world.cuts]
        mine = [a for a in reached if a.job is not None and a.job.epoch == placed.epoch]
        for address in placed.addresses:
            if all(address.aggregator != a.name for a in reached):
                self.say(m.Unreachable("lm", self.rank, placed.epoch, address, "gone"))
        if placed.initialise and placed.applied == self.step:
            for aggregator in mine:
                for number, block in aggregator.job.blocks.items():
                    if not block.complete:
                        block.complete, block.chain = True, (("fresh", placed.epoch),)
                        aggregator.save(number, block, 0)
        done: dict[int, int] = {}
        for aggregator in mine:
            for number, block in aggregator.job.blocks.items():
                if block.complete:
                    done[number] = max(block.applied, done.get(number, 0))
        if len(done) == BLOCKS and all(applied > self.step for applied in done.values()):
            self.step += 1
            self.say(m.Progress("lm", self.rank, placed.epoch, self.step, 0.01, 0.01))
        if len(done) == BLOCKS:
            for aggregator in mine:
                aggregator.commit(placed.epoch, self.rank, self.step + 1)
