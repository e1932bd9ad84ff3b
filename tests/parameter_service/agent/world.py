"""Workers' progress against aggregators that are models: links keep order, everything else happens in any order."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from random import Random

from computron.parameter_service.agent.actions import Connect, Disconnect, Fail, JoinLater, Send, Wish
from computron.parameter_service.agent.progress import Progress
from computron.parameter_service.wire.messages import (
    Address,
    Applied,
    Commit,
    Contents,
    Flush,
    Hosted,
    Hyperparameters,
    Join,
    Joined,
    Moved,
    Parameters,
    Placement,
    Push,
    Pushed,
    Read,
    Refused,
    Write,
)

GROUPS = (Hyperparameters(0.1),)


@dataclass
class Link:
    up: deque = field(default_factory=deque)
    down: deque = field(default_factory=deque)


@dataclass
class Held:
    """applied: -1 while nobody has written it."""

    applied: int
    pushed: dict[int, int] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)


class World:
    """addresses are names; every block is with one aggregator. history: (block, step) as they were applied."""

    def __init__(
        self, seed: int, workers: int, aggregators: int, blocks: int, shared: bool, eager: bool = False
    ) -> None:
        self.random = Random(seed)
        self.shared = shared
        self.eager = eager
        self.names = [f"a{n}" for n in range(aggregators)]
        self.owner = [self.random.choice(self.names) for _ in range(blocks)]
        self.held = [Held(-1) for _ in range(blocks)]
        self.epoch = 0
        self.workers = [Progress("job", "", str(rank), blocks, eager=eager) for rank in range(workers)]
        self.links: dict[tuple[int, str], Link] = {}
        self.joined: dict[tuple[int, str], int] = {}
        self.pending: deque = deque()
        self.staging = [defaultdict(int) for _ in self.workers]
        self.wished: list[tuple[int, int] | None] = [None] * workers
        self.history: list[tuple[int, int]] = []
        self.gone: dict[tuple[str, int], Moved] = {}  # by who gave it away
        self.fresh_epoch(0)

    def fresh_epoch(self, applied: int) -> None:
        """What the master does: the blocks are at `applied`, nothing else of them counts."""
        self.epoch += 1
        self.gone.clear()
        for block in self.held:
            block.applied = applied if block.applied >= 0 else -1
            block.pushed.clear()
            block.committed.clear()
        names = sorted(set(self.owner))
        for rank, worker in enumerate(self.workers):
            placement = Placement(
                "job", self.epoch, rank, tuple(range(len(self.workers))),
                tuple(names.index(owner) for owner in self.owner),
                tuple(_address(name) for name in names), applied, 0, rank == 0 and self.held[0].applied < 0,
            )  # fmt: skip
            self.pending.append(lambda w=worker, p=placement, r=rank: self.do(r, w.placed(p)))

    def recover(self) -> None:
        """An epoch from the step that some block has seen: those that lack it are completed."""
        if any(block.applied < 0 for block in self.held):
            return
        step = max(block.applied for block in self.held)
        for index, block in enumerate(self.held):
            if block.applied < step:
                assert self.complete(index), "somebody's gradient is nowhere"
                self.history.append((index, step))
        self.fresh_epoch(step)

    def complete(self, index: int) -> bool:
        step = self.held[index].applied + 1
        return all(self.staged(rank, index) == step for rank in range(len(self.workers)))

    def staged(self, rank: int, index: int) -> int:
        return self.staging[rank][index] if self.shared else self.held[index].pushed.get(rank, 0)

    def roll_back(self, by: int) -> None:
        if all(block.applied >= 0 for block in self.held):
            step = max(0, min(block.applied for block in self.held) - by)
            self.history = [(index, seen) for index, seen in self.history if seen <= step]
            self.fresh_epoch(step)

    def move(self) -> None:
        """A block whose next step nobody has pushed or committed leaves."""
        index = self.random.randrange(len(self.held))
        block, to = self.held[index], self.random.choice(self.names)
        following = block.applied + 1
        if block.applied < 0 or to == self.owner[index] or following in block.committed.values():
            return
        if following in block.pushed.values():
            return
        message = Moved("job", self.epoch, block.applied, (index,), _address(to))
        self.gone[self.owner[index], index] = message
        self.gone.pop((to, index), None)
        for rank in range(len(self.workers)):
            if self.joined.get((rank, self.owner[index])) == self.epoch:
                self.tell(rank, self.owner[index], message)
        self.owner[index] = to
        block.pushed.clear()
        self.tell_hosted(to, [index])

    def break_link(self) -> None:
        if self.links:
            rank, name = self.random.choice(sorted(self.links))
            self.drop(rank, name)
            worker = self.workers[rank]
            self.do(rank, worker.lost(name))
            if name in worker.peers:
                self.dial(rank, name)

    def work(self) -> None:
        """A training thread stages something, or wants its step."""
        rank = self.random.randrange(len(self.workers))
        worker = self.workers[rank]
        if not worker.ready:
            return
        step = worker.step + 1
        self.stage(rank, self.random.sample(range(len(self.held)), self.random.randint(0, len(self.held))))
        if self.random.random() < 0.5:
            self.want(rank, step)

    def stage(self, rank: int, blocks: list[int]) -> None:
        worker = self.workers[rank]
        step = worker.step + 1
        if self.wished[rank] == (worker.generation, step):
            return
        blocks = [index for index in blocks if worker.blocks[index].applied < step]
        for index in blocks:
            self.staging[rank][index] = step
        self.do(rank, worker.staged(step, blocks))

    def want(self, rank: int, step: int) -> None:
        worker = self.workers[rank]
        if worker.ready and worker.step + 1 == step and self.wished[rank] != (worker.generation, step):
            self.stage(rank, list(range(len(self.held))))
            self.wished[rank] = (worker.generation, step)
            self.do(rank, worker.commit(Wish(step, GROUPS)))

    def run(self, events: int = 10**6) -> None:
        """So many things happen, or until nothing is left to happen."""
        while events and (self.pending or any(link.up or link.down for link in self.links.values())):
            events -= 1
            busy = [(key, queue) for key, link in self.links.items() for queue in (link.up, link.down) if queue]
            if self.pending and (not busy or self.random.random() < 0.2):
                self.pending.popleft()()
                continue
            (rank, name), queue = self.random.choice(busy)
            message = queue.popleft()
            if queue is self.links[rank, name].up:
                self.serve(rank, name, *message)
            else:
                self.take(rank, name, message)

    def settle(self, step: int) -> None:
        """All workers go on until they have seen `step`."""
        while min(worker.step for worker in self.workers) < step:
            before = [worker.step for worker in self.workers], len(self.history)
            self.run()
            for rank, worker in enumerate(self.workers):
                self.want(rank, worker.step + 1)
            self.run()
            if ([worker.step for worker in self.workers], len(self.history)) == before:
                raise AssertionError(f"nothing happens any more: {[vars(w.ledger) for w in self.workers]}")

    # The aggregators.

    def serve(self, rank: int, name: str, message, staged: int) -> None:
        epoch = getattr(message, "epoch", self.epoch)
        if isinstance(message, Flush):
            self.tell(rank, name, Pushed("job", message.step))
            return
        if epoch != self.epoch:
            self.tell(rank, name, Refused("job", "stale_epoch", "old"))
            return
        match message:
            case Join():
                self.joined[rank, name] = self.epoch
                own = [index for index, owner in enumerate(self.owner) if owner == name]
                self.tell(rank, name, self.hosted(own))
                for (giver, _), moved in self.gone.items():
                    if giver == name:
                        self.tell(rank, name, moved)
                return
        if self.joined.get((rank, name)) != self.epoch:
            self.tell(rank, name, Refused("job", "stale_epoch", "join again"))
            return
        match message:
            case Write(block=index):
                assert self.owner[index] != name or self.held[index].applied in (-1, message.applied)
                assert not self.history
                if self.held[index].applied < 0:
                    self.held[index].applied = message.applied
                    self.tell_hosted(name, [index])
            case Read(block=index) if self.owner[index] == name:
                self.tell(rank, name, Contents("job", index, "parameters", self.held[index].applied, 0))
            case Push(block=index) if self.owner[index] == name:
                assert self.held[index].applied + 1 >= message.step
                self.held[index].pushed[rank] = staged
            case Commit():
                for index in message.blocks:
                    self.commit(rank, name, index, message.step)
            case Read() | Push():
                self.tell(rank, name, Refused("job", "not_owner", "", 0, (message.block,)))

    def commit(self, rank: int, name: str, index: int, step: int) -> None:
        block = self.held[index]
        if self.owner[index] != name:
            return
        if block.applied >= step:
            self.tell_applied(rank, name, index, step)
            return
        assert step == block.applied + 1
        if self.eager and self.staged(rank, index) != step:  # it was away when the gradient came
            self.tell(rank, name, Refused("job", "not_owner", "", step, (index,)))
            return
        assert self.staged(rank, index) == step, "committed before it was staged"
        block.committed[rank] = step
        if not self.eager:
            for other, held in enumerate(self.held):
                assert held.applied >= step or self.staged(rank, other) == step, "committed before all was staged"
        if all(block.committed.get(r) == step for r in range(len(self.workers))):
            block.applied = step
            block.committed.clear()
            self.history.append((index, step))
            for r in range(len(self.workers)):
                self.tell_applied(r, name, index, step)

    def hosted(self, blocks: list[int]) -> Joined:
        complete = [index for index in blocks if self.held[index].applied >= 0]
        return Joined("job", self.epoch, tuple(Hosted(i, self.held[i].applied, f"m{i}") for i in complete))

    def tell_hosted(self, name: str, blocks: list[int]) -> None:
        for rank in range(len(self.workers)):
            if self.joined.get((rank, name)) == self.epoch:
                self.tell(rank, name, self.hosted(blocks))

    def tell_applied(self, rank: int, name: str, index: int, step: int) -> None:
        self.tell(rank, name, Applied("job", step, (index,)) if self.shared else Parameters("job", step, index))

    def tell(self, rank: int, name: str, message) -> None:
        if (rank, name) in self.links:
            self.links[rank, name].down.append(message)

    # The workers' shell.

    def do(self, rank: int, actions) -> None:
        for action in actions:
            match action:
                case Connect(address):
                    self.dial(rank, address.aggregator)
                case Disconnect(name):
                    self.drop(rank, name)
                case JoinLater(name):
                    self.pending.append(lambda r=rank, n=name: self.do(r, self.workers[r].join(n)))
                case Send(name, message):
                    staged = self.staging[rank][message.block] if isinstance(message, Push) else 0
                    if (rank, name) in self.links:
                        self.links[rank, name].up.append((message, staged))
                case Fail(_, message):
                    raise AssertionError(message)

    def dial(self, rank: int, name: str) -> None:
        def connect() -> None:
            if name in self.workers[rank].peers and (rank, name) not in self.links:
                self.links[rank, name] = Link()
                self.do(rank, self.workers[rank].connected(name, self.shared))

        self.pending.append(connect)

    def drop(self, rank: int, name: str) -> None:
        self.links.pop((rank, name), None)
        self.joined.pop((rank, name), None)

    def take(self, rank: int, name: str, message) -> None:
        worker = self.workers[rank]
        match message:
            case Parameters() | Contents():
                parameters = isinstance(message, Parameters)
                step = message.step if parameters else message.applied
                state = worker.blocks[message.block]
                again = state.hosted and state.owner == name and step >= state.applied
                if worker.accepts(name, message.block, step) if parameters else again:
                    worker.fills(message.block)
                self.do(rank, worker.read(name, message.block, step))
            case Joined():
                self.do(rank, worker.joined(name, message))
            case Applied():
                self.do(rank, worker.applied(name, message))
            case Moved():
                self.do(rank, worker.moved(name, message))
            case Pushed():
                self.do(rank, worker.pushed(name, message))
            case Refused():
                self.do(rank, worker.refused(name, message))


def _address(name: str) -> Address:
    return Address(name, "host", 1, "machine", "")
