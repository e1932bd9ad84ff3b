"""The norm of a step's gradient, of which each owner knows its blocks' part."""

from __future__ import annotations

from collections.abc import Iterable


class Norm:
    """scale: by which the gradient is multiplied first; None while nobody asks. times: how often it was asked for in
    this step: gradients that came anew make answers to earlier questions wrong.
    """

    def __init__(self, blocks: int) -> None:
        self.scale: float | None = None
        self.times = 0
        self._blocks = blocks
        self._asked: set[str] = set()
        self._squares: dict[int, float] = {}

    @property
    def squared(self) -> float | None:
        """Once all blocks' owners have answered."""
        if len(self._squares) < self._blocks:
            return None
        return sum(self._squares[index] for index in range(self._blocks))

    def want(self, scale: float) -> None:
        self.scale = scale
        self.times += 1
        self.ask_anew()

    def ask_anew(self) -> None:
        """All of them: what they have said does not count any more."""
        self._asked.clear()
        self._squares.clear()

    def ask_all_again(self) -> None:
        """What they have said still counts."""
        self._asked.clear()

    def ask_again(self, owner: str) -> None:
        self._asked.discard(owner)

    def left_to_ask(self, owners: set[str]) -> list[str]:
        """In order; from now on they count as asked."""
        left = sorted(owners - self._asked)
        self._asked.update(left)
        return left

    def answered(self, squares: Iterable[tuple[int, float]]) -> None:
        self._squares.update(squares)

    def forget(self, block: int) -> None:
        """Its owner is another one."""
        self._squares.pop(block, None)

    def new_step(self) -> None:
        self.scale, self.times = None, 0
        self._squares.clear()
