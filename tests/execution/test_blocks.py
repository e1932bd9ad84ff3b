from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from computron.execution.blocks import BlockAllocator, blocks_for


def test_a_block_holds_sixteen_tokens() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_the_lowest_free_blocks_are_taken() -> None:
    allocator = BlockAllocator()
    allocator.set_limit(8)
    assert allocator.take(3) == [0, 1, 2]
    allocator.release([1])
    assert allocator.take(2) == [1, 3]


def test_taking_more_than_is_free_takes_nothing() -> None:
    allocator = BlockAllocator()
    allocator.set_limit(2)
    assert allocator.take(3) is None
    assert allocator.free == 2


def test_a_block_is_released_once() -> None:
    allocator = BlockAllocator()
    allocator.set_limit(2)
    allocator.take(1)
    allocator.release([0])
    with pytest.raises(KeyError):
        allocator.release([0])


def test_a_limit_below_what_is_used_is_refused() -> None:
    allocator = BlockAllocator()
    allocator.set_limit(4)
    allocator.take(3)
    with pytest.raises(ValueError, match="3 blocks of the KV cache are in use, only 2"):
        allocator.set_limit(2)
    assert allocator.limit == 4


class Allocations(RuleBasedStateMachine):
    """Random takes, releases and limits against sets of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator()
        self.owners: list[list[int]] = []

    @property
    def in_use(self) -> list[int]:
        return [block for blocks in self.owners for block in blocks]

    @rule(count=st.integers(1, 6))
    def take(self, count: int) -> None:
        free = self.allocator.limit - len(self.in_use)
        blocks = self.allocator.take(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(blocks) == count
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.allocator.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @rule(limit=st.integers(0, 40))
    def set_limit(self, limit: int) -> None:
        if limit < len(self.in_use):
            with pytest.raises(ValueError, match="in use"):
                self.allocator.set_limit(limit)
            return
        before = set(self.in_use)
        moves = self.allocator.set_limit(limit)
        assert set(moves) == {block for block in before if block >= limit}
        assert not before & set(moves.values())
        self.owners = [[moves.get(block, block) for block in blocks] for blocks in self.owners]

    @invariant()
    def every_block_is_owned_once_and_below_the_limit(self) -> None:
        used = self.in_use
        assert len(set(used)) == len(used)
        assert set(used) == self.allocator.used
        assert all(block < self.allocator.limit for block in used)
        assert self.allocator.free == self.allocator.limit - len(used)


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
