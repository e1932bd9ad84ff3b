"""How far a worker is, and what it tells whom next. Pure: events in, actions out; no clock, no socket, no thread.

A step goes as follows. Blocks are staged, one by one or all at once (`staged`); what goes by TCP is pushed. The
training thread wants the step taken (`commit`). All blocks are committed when the gradients of all of them are with
their owners: whoever finds a step half taken can complete it without this worker. Only where nothing lasts (optimizer
"sum") a block is committed as soon as its own gradient is there. A block is through when its owner says so (`applied`),
a step when all blocks are.

What may come between, at any moment: an owner gives blocks away (`moved`): they are pushed and committed again to the
new one. A link breaks (`lost`) and comes back (`connected`): the same. The master reconfigures the job (`placed`):
everything that has no answer is sent again in the new epoch, unless the job goes on from another step than this worker
is in: then what it was working on is dropped (`generation` counts this).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from computron.parameter_service.agent.actions import (
    Action,
    Connect,
    Disconnect,
    Fail,
    JoinLater,
    Map,
    Peer,
    Send,
    Unshare,
    Wish,
)
from computron.parameter_service.agent.ledger import Ledger
from computron.parameter_service.agent.loads import Loads
from computron.parameter_service.agent.norm import Norm
from computron.parameter_service.specs import PARAMETERS
from computron.parameter_service.wire import refusals
from computron.parameter_service.wire.messages import (
    Address,
    Applied,
    AskNorms,
    Flush,
    Join,
    Joined,
    Moved,
    Norms,
    Placement,
    Push,
    Pushed,
    Read,
    Refused,
    Write,
)

RETRIED = {refusals.STALE_EPOCH, refusals.NOT_OWNER, refusals.UNKNOWN_JOB}


class Progress:
    """step: the last one that all blocks have seen. generation: how often the job went on from another step than this
    worker was in. lost_steps: that rollbacks took back. eager: blocks are committed one by one; a step that a new epoch
    finds half taken is dropped.
    """

    def __init__(self, job: str, token: str, incarnation: str, blocks: int, *, eager: bool = False) -> None:
        self.job = job
        self.rank, self.epoch = -1, 0
        self.generation = self.lost_steps = 0
        self.members: tuple[int, ...] = ()
        self.loads = Loads()
        self.peers: dict[str, Peer] = {}
        self.ledger = Ledger(blocks)
        self.blocks = self.ledger.blocks
        self._token, self._incarnation, self._eager = token, incarnation, eager
        self._unwritten: set[int] = set()  # blocks whose first parameters this worker brings
        self._spoken_of: set[tuple[str, int]] = set()  # blocks that an aggregator has or had, which is not their owner
        self._wish: Wish | None = None
        self._wished: set[int] = set()
        self._norm = Norm(blocks)  # asked for: again where others may still wait for it

    @property
    def step(self) -> int:
        return self.ledger.step

    @property
    def ready(self) -> bool:
        """The parameters here are the job's, after `step`."""
        return self.epoch > 0 and not self.ledger.stale

    @property
    def squared_norm(self) -> float | None:
        """Of the gradient, once all blocks' owners have answered."""
        return self._norm.squared

    @property
    def wants_step(self) -> bool:
        return self._wish is not None

    @property
    def wants_norm(self) -> bool:
        return self._norm.scale is not None and self._wish is None and self.squared_norm is None

    # Wishes of the training thread.

    def staged(self, step: int, blocks: Iterable[int]) -> list[Action]:
        """The gradients of these blocks lie in staging, maybe once more."""
        touched = [index for index in blocks if step in (self.step + 1, self.step + 2)]
        touched = [index for index in touched if self.blocks[index].applied < step]
        for index in touched:
            self.blocks[index].staged = step
            self._not_flushed(index)
            self.ledger.unplace(index)
        return self._advance(touched)

    def commit(self, wish: Wish, blocks: Iterable[int] | None = None) -> list[Action]:
        """blocks: None for all; others of the same step may follow. A wish for a step that is not next is dropped."""
        if wish.step != self.step + 1:
            return []
        self._wish = wish
        touched = set(range(len(self.blocks)) if blocks is None else blocks)
        self._wished |= touched
        return self._advance(touched)

    def ask_norms(self, step: int, scale: float) -> list[Action]:
        """`squared_norm` has the answer later. All blocks must be staged."""
        if step != self.step + 1:
            return []
        self._norm.want(scale)
        return self._advance(())

    def join(self, aggregator: str) -> list[Action]:
        """Ask it once more what it has, if it is still of this job."""
        peer = self.peers.get(aggregator)
        return [self._join(aggregator)] if peer is not None and peer.connected else []

    # Events.

    def placed(self, placement: Placement) -> list[Action]:
        if placement.epoch <= self.epoch:
            return []
        first, following = self.epoch == 0, self.step + 1
        completes = placement.applied == following and self._wish is not None and not self._eager
        self.epoch, self.rank, self.members = placement.epoch, placement.rank, placement.members
        self.loads.placed(placement)
        self._unwritten = set(range(len(self.blocks))) if placement.initialise and not placement.loading else set()
        self._spoken_of.clear()
        jumps = first or not (placement.applied == self.step or completes)
        for index, block in enumerate(self.blocks):
            block.owner = placement.addresses[placement.owners[index]].aggregator
            block.hosted = block.written = False
            block.forget_sent()
            if jumps or placement.loading or block.filling or block.applied > placement.applied:
                block.applied = -1
            block.filling = False
            if jumps:
                block.staged = 0
        if jumps:
            if not first:
                self.generation += 1
                self.lost_steps += max(0, self.step - placement.applied)
            self._begin_step(placement.applied)
        else:
            self.ledger.begin(self.step)
        self._norm.ask_anew()
        actions: list[Action] = []
        wanted = {address.aggregator: address for address in placement.addresses}
        for name, peer in list(self.peers.items()):
            peer.joined, peer.flushing = False, None
            if wanted.get(name) == peer.address and peer.connected and peer.shared:
                actions.append(self._join(name))
            else:
                del self.peers[name]  # a payload may be on its way in: it must not meet what the new epoch brings
                actions.append(Disconnect(name))
        return [*actions, *(action for address in wanted.values() for action in self._know(address))]

    def connected(self, aggregator: str, shared: bool) -> list[Action]:
        peer = self.peers.get(aggregator)
        if peer is None:
            return [Disconnect(aggregator)]
        peer.connected, peer.shared, peer.joined, peer.flushing = True, shared, False, None
        return [self._join(aggregator)]

    def lost(self, aggregator: str) -> list[Action]:
        peer = self.peers.pop(aggregator, None)
        self._norm.ask_again(aggregator)
        owned = [index for index, block in enumerate(self.blocks) if block.owner == aggregator]
        if peer is None or not owned:  # until it gets a block: another one may have its name by then
            return [Disconnect(aggregator)]
        peer.connected, peer.joined, peer.flushing = False, False, None
        self.peers[aggregator] = peer
        for index in owned:
            self._leave_owner(index)
        return []

    def joined(self, sender: str, message: Joined) -> list[Action]:
        peer = self.peers.get(sender)
        if peer is None or message.epoch != self.epoch:
            return []
        peer.joined = True
        actions: list[Action] = []
        touched = []
        for hosted in message.blocks:
            block = self.blocks[hosted.block]
            if block.hosted and block.owner != sender:
                self._spoken_of.add((sender, hosted.block))
                continue
            touched.append(hosted.block)
            block.owner, block.hosted = sender, True
            if not peer.shared:
                if block.memory is not None:
                    block.memory = None
                    actions.append(Unshare(hosted.block))
                if block.applied != hosted.applied:
                    actions.append(Send(sender, Read(self.job, hosted.block, PARAMETERS)))
                continue
            if block.memory != hosted.memory:
                block.memory = hosted.memory
                actions.append(Map(hosted.block))
            if block.applied != hosted.applied:
                self._saw(hosted.block, hosted.applied)
        self._unwritten.difference_update(touched)
        actions += self._write_first(sender)
        return actions + self._advance(touched)

    def applied(self, sender: str, message: Applied) -> list[Action]:
        for index in message.blocks:
            if self.accepts(sender, index, message.step):
                self._saw(index, message.step)
        return []

    def accepts(self, sender: str, block: int, step: int) -> bool:
        """Whether this aggregator may say that the block has seen this step."""
        state = self.blocks[block]
        return state.hosted and state.owner == sender and step == state.applied + 1

    def fills(self, block: int) -> None:
        """Parameters are coming in: the ones before are no more."""
        self.blocks[block].filling = True

    def read(self, sender: str, index: int, step: int) -> list[Action]:
        """The block's parameters after this step have come in."""
        block = self.blocks[index]
        if not (block.filling and block.hosted and block.owner == sender):
            return []
        block.filling = False
        self._saw(index, step)
        return self._advance((index,))

    def moved(self, sender: str, message: Moved) -> list[Action]:
        if message.epoch != self.epoch:
            return []
        moving = {index for index in message.blocks if self.blocks[index].owner == sender}
        self._spoken_of.update((sender, index) for index in message.blocks if index not in moving)
        for index in moving:
            self._leave_owner(index)
            self.blocks[index].owner = message.to.aggregator
        if not moving:
            return []
        self._norm.ask_all_again()
        self._unwritten -= moving
        # Whoever was heard of these blocks before may have them by now, or know who has: they came and went faster than
        # the word of those that gave them. An aggregator that is asked tells how things stand, so that to ask in vain
        # costs one message.
        asked = {name for name, index in self._spoken_of if index in moving}
        self._spoken_of = {known for known in self._spoken_of if known[1] not in moving}
        actions = self._know(message.to)
        for name in sorted(asked):
            actions += self.join(name)
        return actions

    def pushed(self, sender: str, message: Pushed) -> list[Action]:
        peer = self.peers.get(sender)
        if peer is None or peer.flushing is None:
            return []
        flushed, peer.flushing = peer.flushing, None
        touched = [
            i for i in flushed if i in self.ledger.missing and self.blocks[i].owner == sender and self.blocks[i].pushed
        ]
        for index in touched:
            self.ledger.place(index)
        return self._advance(touched)

    def norms(self, sender: str, message: Norms) -> list[Action]:
        if (message.step, message.time) == (self.step + 1, self._norm.times) and self._norm.scale is not None:
            self._norm.answered((i, square) for i, square in message.blocks if self.blocks[i].owner == sender)
        return []

    def refused(self, sender: str, message: Refused) -> list[Action]:
        if message.code not in RETRIED:
            return [Fail(message.code, message.message)]
        self._norm.ask_again(sender)
        for index, block in enumerate(self.blocks):
            if block.owner == sender and (index in message.blocks or message.code != refusals.NOT_OWNER):
                self._leave_owner(index)
        return [JoinLater(sender)]

    # What follows.

    def _advance(self, touched: Iterable[int]) -> list[Action]:
        touched = list(touched)
        actions: list[Action] = []
        for index in touched:
            actions += self._push(index)
        if self._wish is None and self._norm.scale is None:
            return actions
        if self._norm.scale is not None or self.ledger.missing <= self._wished:
            actions += self._flush()
        if self._norm.scale is not None and not self.ledger.unplaced:
            asked = AskNorms(self.job, self.epoch, self.step + 1, self._norm.scale, self._norm.times)
            owners = {block.owner for block in self.blocks if block.hosted}
            actions += [Send(name, asked) for name in self._norm.left_to_ask(owners)]
        if self._wish is not None:
            if self._eager:
                actions += self._commit_blocks(index for index in touched if self.blocks[index].placed)
            elif not self.ledger.unplaced and self.ledger.missing <= self._wished:
                actions += self._commit_blocks(self.ledger.missing)
        return actions

    def _push(self, index: int) -> list[Action]:
        block = self.blocks[index]
        if not block.hosted or block.applied < 0 or block.staged != block.applied + 1 or block.pushed:
            return []
        block.pushed = True
        if self.peers[block.owner].shared:
            self.ledger.place(index)
            return []
        if self._eager:  # its commit comes behind it
            self.ledger.place(index)
        return [Send(block.owner, Push(self.job, self.epoch, block.staged, index))]

    def _flush(self) -> list[Action]:
        pushed: dict[str, set[int]] = defaultdict(set)
        incomplete = set()
        for index in self.ledger.unplaced:
            block = self.blocks[index]
            if block.pushed:
                pushed[block.owner].add(index)
            else:
                incomplete.add(block.owner)
        actions: list[Action] = []
        for name in sorted(pushed.keys() - incomplete):
            peer = self.peers[name]
            if peer.flushing is None:
                peer.flushing = pushed[name]
                actions.append(Send(name, Flush(self.job, self.step + 1)))
        return actions

    def _commit_blocks(self, indices: Iterable[int]) -> list[Action]:
        wish = self._wish
        assert wish is not None
        by_owner: dict[str, list[int]] = defaultdict(list)
        for index in sorted(indices):
            block = self.blocks[index]
            if index in self._wished and block.placed and block.staged == wish.step and not block.committed:
                block.committed = True
                by_owner[block.owner].append(index)
        return [Send(owner, wish.commit(self.job, self.epoch, blocks)) for owner, blocks in by_owner.items()]

    def _write_first(self, owner: str) -> list[Action]:
        writes = [index for index in sorted(self._unwritten) if self.blocks[index].owner == owner]
        writes = [index for index in writes if not self.blocks[index].written]
        for index in writes:
            self.blocks[index].written = True
        return [Send(owner, Write(self.job, self.epoch, index, PARAMETERS, self.step, True)) for index in writes]

    def _know(self, address: Address) -> list[Action]:
        if address in (peer.address for peer in self.peers.values()):
            return []
        self.peers[address.aggregator] = Peer(address)
        return [Connect(address)]

    def _join(self, aggregator: str) -> Send:
        shared = self.peers[aggregator].shared
        return Send(aggregator, Join(self.job, self._token, self.rank, self._incarnation, self.epoch, shared))

    def _saw(self, index: int, step: int) -> None:
        if self.ledger.saw(index, step):
            self._begin_step(step)

    def _begin_step(self, done: int) -> None:
        self._wish, self._wished = None, set()
        self._norm.new_step()
        self.ledger.begin(done)

    def _leave_owner(self, index: int) -> None:
        self._not_flushed(index)
        self.ledger.leave_owner(index)
        self._norm.forget(index)

    def _not_flushed(self, index: int) -> None:
        """The answer to a Flush that is on its way says nothing of this block."""
        peer = self.peers.get(self.blocks[index].owner)
        if peer is not None and peer.flushing is not None:
            peer.flushing.discard(index)
