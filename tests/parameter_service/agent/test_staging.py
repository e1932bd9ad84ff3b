"""What is put is copied, in the order in which it was put, by whichever thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from computron.parameter_service.agent.staging import BATCH, Staging
from computron.parameter_service.layout import Layout, TensorSpec

PATIENCE = 10.0  # seconds


class Watched:
    """A staging segment, and what it tells. held: `may_write` waits while it is clear."""

    def __init__(self, *shapes: tuple[int, ...], gradients: str = "float32", block_elements: int = 1 << 20) -> None:
        tensors = [TensorSpec(str(number), shape, "float32", 0) for number, shape in enumerate(shapes)]
        self.layout = Layout(tensors, block_elements)
        self.told: list[tuple[list[int], bool]] = []
        self.copiers: set[str] = set()
        self.errors: list[BaseException] = []
        self.held, self.idle = threading.Event(), threading.Event()
        self.held.set()
        self.staging = Staging(
            self.layout,
            gradients,
            staged=lambda blocks, final: self.told.append((blocks, final)),
            may_write=self.may_write,
            idle=self.idle.set,
            failed=self.errors.append,
        )
        self.gradients = [torch.randn(shape) for shape in shapes]

    def may_write(self, block: int) -> bool:
        self.copiers.add(threading.current_thread().name)
        return self.held.wait(PATIENCE)

    def assert_staged(self, dtype: torch.dtype = torch.float32) -> None:
        assert self.idle.wait(PATIENCE)
        assert self.staging.idle
        assert not self.errors
        for tensor, offset, gradient in zip(self.layout.tensors, self.layout.offsets, self.gradients, strict=True):
            flat = self.staging.segment.tensor(dtype, offset * dtype.itemsize, tensor.elements)
            assert torch.equal(flat, gradient.reshape(-1).to(dtype))


@pytest.fixture
def watched() -> Iterator[type[Watched]]:
    made: list[Watched] = []

    class Kept(Watched):
        def __init__(self, *shapes: tuple[int, ...], **settings: object) -> None:
            super().__init__(*shapes, **settings)  # type: ignore[arg-type]
            made.append(self)

    yield Kept
    for one in made:
        one.held.set()
        one.staging.close()


def test_small_gradients_are_copied_together_by_whoever_finishes(watched) -> None:
    it = watched((3,), (5, 7), (1,))
    for number, gradient in enumerate(it.gradients[:2]):
        it.staging.put(number, gradient)
    assert not it.copiers
    assert not it.staging.idle
    assert it.staging.finish([(2, it.gradients[2])]) == ([], [])
    it.assert_staged()
    assert it.told == [([0], True)]
    assert it.copiers == {"MainThread"}


def test_what_is_pushed_is_copied_without_waiting_for_the_end(watched) -> None:
    it = watched((3,), (5, 7))
    for number, gradient in enumerate(it.gradients):
        it.staging.put(number, gradient)
    it.staging.push()
    it.assert_staged()
    assert it.told == [([0], False)]
    assert it.copiers == {"computron-push"}
    assert it.staging.finish([]) == ([0], [])


def test_a_large_gradient_is_copied_at_once_and_told_of_block_by_block(watched) -> None:
    it = watched((BATCH,), block_elements=BATCH // 4)
    it.staging.put(0, it.gradients[0])
    it.assert_staged()
    assert it.told == [([block], False) for block in range(4)]


def test_large_last_gradients_are_all_copied(watched) -> None:
    it = watched(*[(BATCH,)] * 6, (10,), block_elements=BATCH)
    assert it.staging.finish(enumerate(it.gradients)) == ([], [])
    it.assert_staged()
    assert sorted(block for blocks, final in it.told for block in blocks if final) == list(range(7))


def test_a_gradient_that_is_put_again_replaces_what_was_put(watched) -> None:
    it = watched((3,), (5,))
    it.staging.put(0, torch.zeros(3))
    it.staging.put(1, it.gradients[1])
    it.staging.finish([(0, it.gradients[0])])
    it.assert_staged()


def test_a_gradient_that_is_being_copied_is_not_overtaken_by_its_successor(watched) -> None:
    it = watched((3,), (5,))
    it.held.clear()
    it.staging.put(0, torch.zeros(3))
    it.staging.push()
    it.staging.finish(enumerate(it.gradients))  # does not wait for the thread
    assert not it.staging.idle
    it.held.set()
    it.assert_staged()
    assert it.copiers == {"computron-push"}


@pytest.mark.parametrize("gradients", ["bfloat16", "float16"])
def test_gradients_are_cast_and_may_be_strided(watched, gradients) -> None:
    it = watched((8, 6), (2000,), gradients=gradients, block_elements=1024)
    it.gradients = [torch.randn(6, 8).t(), torch.randn(4000)[::2]]
    it.staging.finish(enumerate(it.gradients))
    it.assert_staged(getattr(torch, gradients))


def test_none_stands_for_zeros(watched) -> None:
    it = watched((3,), (2000,), block_elements=1024)
    it.staging.finish(enumerate(it.gradients))
    it.assert_staged()
    it.idle.clear()
    it.staging.begin()
    it.staging.finish([(0, None), (1, None)])
    it.gradients = [torch.zeros(3), torch.zeros(2000)]
    it.assert_staged()


def test_a_step_may_be_staged_before_its_end_is_known(watched) -> None:
    it = watched((3,), (5,))
    it.staging.finish([(0, it.gradients[0])], final=False)
    assert it.idle.wait(PATIENCE)
    assert it.told == []
    assert it.staging.untold() == [0]
    assert it.staging.untold() == []
    it.staging.finish([(1, it.gradients[1])])
    it.assert_staged()
    assert it.told == [([0], True)]


def test_what_cannot_be_copied_is_told(watched) -> None:
    it = watched((3,), (5,))
    it.staging.finish([(0, torch.zeros(4))])
    assert len(it.errors) == 1
