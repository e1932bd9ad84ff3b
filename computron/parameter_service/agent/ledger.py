"""What a worker knows of its job's blocks, and which of them it still waits for."""

from __future__ import annotations

from computron.parameter_service.agent.actions import BlockState


class Ledger:
    """step: the last one that all blocks have seen. stale: blocks whose parameters here are older, or not the job's.

    missing: blocks that have not seen the next step. unplaced: those of them whose gradient is not with their owner.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = [BlockState() for _ in range(blocks)]
        self.begin(0)

    def begin(self, step: int) -> None:
        """All have seen this step."""
        self.step = step
        blocks = list(enumerate(self.blocks))
        self.stale = {index for index, block in blocks if block.applied < step}
        self.missing = {index for index, block in blocks if block.applied <= step}
        self.unplaced = {index for index in self.missing if not self.blocks[index].placed}

    def saw(self, index: int, step: int) -> bool:
        """The block has seen this step; True if it was the last one to see it."""
        block = self.blocks[index]
        block.applied = step
        block.forget_sent()
        if step >= self.step:
            self.stale.discard(index)
        if step <= self.step:
            return False
        self.missing.discard(index)
        self.unplaced.discard(index)
        return not self.missing

    def leave_owner(self, index: int) -> None:
        """What was sent to its owner does not count any more."""
        block = self.blocks[index]
        block.hosted = block.written = False
        if block.filling:
            block.filling, block.applied = False, -1
            self.stale.add(index)
        self.unplace(index)

    def place(self, index: int) -> None:
        """Its gradient is with its owner."""
        self.blocks[index].placed = True
        self.unplaced.discard(index)

    def unplace(self, index: int) -> None:
        self.blocks[index].forget_sent()
        if index in self.missing:
            self.unplaced.add(index)
