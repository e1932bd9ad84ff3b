"""A small world around a pure master: aggregators and workers that die, links that break, messages that come late.

A block's state is the chain of what was applied to it: (step, members) after (step, members). Blocks that are at the
same step must have the same chain, whatever happened.
"""

from __future__ import annotations

from contextlib import suppress
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
from tests.parameter_service.master.fakes import job_spec
from tests.parameter_service.master.world_peers import BLOCKS, SNAPSHOT_EVERY, SimAggregator, SimPeer, SimWorker


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
