"""A small world around a pure master: aggregators and workers that die, links that break, messages that come late.

A block's state is the chain of what was applied to it: (step, members) after (step, members). Blocks that are at the
same step must have the same chain, whatever happened.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

from computron.errors import ComputronError
from computron.parameter_service.master.events import (
    Closed,
    Exited,
    Finish,
    Finished,
    Log,
    MoveAsked,
    Received,
    Send,
    Tick,
)
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.scaling import ScalingSettings
from computron.parameter_service.packing import PACKERS
from computron.parameter_service.wire import messages as m
from tests.parameter_service.master.fakes import address_of, enlist, job_spec

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
            jobs = (m.HostedJob(self.world.spec, "secret", self.job.epoch, self.job.members, self.states()),)
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
        self.say(m.Held("lm", message.epoch, self.states(), commits))

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
        self.job = SimJob(message.epoch, message.members, blocks)
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
        path = f"{step}-{self.job.epoch}"
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
                theirs = other.job = SimJob(job.epoch, job.members, {})
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
                self.say(m.Unreachable("lm", self.rank, placed.epoch, address.aggregator, "gone"))
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


class World:
    def __init__(self, seed: int, *, workers: int = 2) -> None:
        self.random = Random(seed)
        self.spec = job_spec("lm", blocks=BLOCKS, workers=workers, snapshot_every=SNAPSHOT_EVERY)
        self.now = 0.0
        self.records: list[Any] = []
        self.next_link = 0
        self.next_pid = 10
        self.files: dict[str, dict[int, tuple[Any, ...]]] = {}
        self.cuts: set[tuple[int, str]] = set()
        self.applied: set[tuple[int, int, int]] = set()
        self.newest_epoch = 0
        self.aggregators: dict[str, SimAggregator] = {}
        self.workers: dict[int, SimWorker] = {}
        self.restart_master()
        for _ in range(2):
            self.start_aggregator()
        for rank in range(workers):
            self.workers[rank] = SimWorker(self, rank, f"{rank}.0")

    # What happens.

    def replayed(self) -> Book:
        book = Book()
        for record in self.records:
            book.apply(record)
        return book

    def restart_master(self) -> None:
        book = self.replayed()
        for peer in self.peers():
            peer.link = None
            peer.queue.clear()
            peer.inbox.clear()
        scaling = ScalingSettings(minimum=1, maximum=4, starts=False)
        self.master = Master(book, PACKERS["utilisation"](), scaling, self.now)
        for name in [name for name in book.known if name not in self.aggregators]:
            self.tell(Exited(name))  # as looking for the process finds out

    def start_aggregator(self) -> None:
        self.next_pid += 1
        name = f"a{self.next_pid}"
        self.aggregators[name] = SimAggregator(self, name, self.next_pid)

    def kill_aggregator(self, aggregator: SimAggregator) -> None:
        aggregator.alive = False
        del self.aggregators[aggregator.name]
        self.close(aggregator)
        self.tell(Exited(aggregator.name))

    def kill_worker(self, worker: SimWorker) -> None:
        worker.alive = False
        del self.workers[worker.rank]
        self.close(worker)
        for aggregator in self.aggregators.values():
            if aggregator.job is not None:
                aggregator.say(m.WorkerLost("lm", worker.rank, worker.incarnation))

    def close(self, peer: SimPeer) -> None:
        """Its link breaks; what is on the way is lost."""
        if peer.link is not None:
            link, peer.link = peer.link, None
            peer.queue.clear()
            peer.inbox.clear()
            self.tell(Closed(link))

    def peers(self) -> list[SimPeer]:
        return [*self.aggregators.values(), *self.workers.values()]

    def tell(self, event: Any) -> None:
        for order in self.master.handle(event, self.now):
            match order:
                case Log():
                    self.records.append(order.record)
                case Send():
                    for peer in self.peers():
                        if peer.link == order.link:
                            peer.inbox.append(order.message)
                case Finish():
                    self.tell(Finished(order.job, order.version, order.step, order.path, 0.0))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick())

    def deliver(self, peer: SimPeer) -> None:
        if peer.queue and peer.link is not None:
            self.tell(Received(peer.link, peer.queue.popleft()))
        if peer.inbox and not peer.deaf and self.random.random() < 0.9:
            peer.receive(peer.inbox.popleft())

    def go_on(self) -> None:
        """Something ordinary."""
        for worker in list(self.workers.values()):
            if self.random.random() < 0.5:
                worker.work()
        for peer in self.peers():
            if self.random.random() < 0.7:
                self.deliver(peer)
        for aggregator in list(self.aggregators.values()):
            if self.random.random() < 0.3:
                aggregator.hand_over()
        for peer in self.peers():
            if peer.link is None and self.now >= peer.away_until and self.random.random() < 0.2:
                peer.connect()
        self.pass_time(self.random.choice((0.001, 0.01, 0.05, 0.2)))

    def disturb(self) -> None:
        choice = self.random.randrange(9)
        workers, aggregators = list(self.workers.values()), list(self.aggregators.values())
        if choice == 0 and len(aggregators) > 1:
            self.kill_aggregator(self.random.choice(aggregators))
        elif choice == 1 and len(aggregators) < 4:
            self.start_aggregator()
        elif choice == 2 and workers:
            self.kill_worker(self.random.choice(workers))
        elif choice == 3:
            rank = self.random.randrange(3)
            if rank not in self.workers:
                self.workers[rank] = SimWorker(self, rank, f"{rank}.{self.next_link}")
        elif choice == 4:
            self.restart_master()
        elif choice == 5:
            away = self.random.choice((0.0, 1.0, 5.0))
            for peer in self.random.choices(self.peers(), k=self.random.choice((1, 3))):
                peer.away_until = self.now + away
                self.close(peer)
        elif choice == 6 and aggregators:
            self.cuts.add((self.random.randrange(3), self.random.choice(aggregators).name))
        elif choice == 7:
            self.cuts.clear()
        else:
            self.move_something()

    def move_something(self) -> None:
        if not self.aggregators:
            return
        blocks = tuple(n for n in range(BLOCKS) if self.random.random() < 0.5)
        with suppress(ComputronError):  # people may ask for what cannot be
            self.tell(MoveAsked("lm", blocks, self.random.choice(list(self.aggregators))))

    def settle(self, rounds: int = 600) -> None:
        """Everything is whole again, and time passes."""
        self.cuts.clear()
        for peer in self.peers():
            peer.away_until = 0.0
        if not self.aggregators:
            self.start_aggregator()
        for rank in range(self.spec.workers):
            if rank not in self.workers:
                self.workers[rank] = SimWorker(self, rank, f"{rank}.{self.next_link}")
        for _ in range(rounds):
            self.go_on()

    # What must hold.

    def check_apply(self, epoch: int, block: int, step: int) -> None:
        assert epoch >= self.newest_epoch, f"epoch {epoch} applies a step after epoch {self.newest_epoch} has"
        self.newest_epoch = epoch
        assert (epoch, block, step) not in self.applied, f"block {block} sees step {step} twice in epoch {epoch}"
        self.applied.add((epoch, block, step))

    def check(self) -> None:
        """Blocks of the newest epoch that are at the same step have the same history."""
        chains: dict[int, tuple[Any, ...]] = {}
        jobs = [a.job for a in self.aggregators.values() if a.job is not None]
        epoch = max((job.epoch for job in jobs if not job.held), default=0)
        for job in jobs:
            for block in job.blocks.values():
                if job.epoch == epoch and not job.held and block.complete:
                    known = chains.setdefault(block.applied, block.chain)
                    assert known == block.chain, f"{known} and {block.chain}"
