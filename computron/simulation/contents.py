"""Which pages of which model are on a virtual device, and how many frames they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class Contents:
    """A content that several models share takes one frame. Models that share nothing are only counted."""

    def __init__(self) -> None:
        self._pages: dict[str, tuple[int, ...]] = {}
        self._shares: set[str] = set()
        self._holders: Counter[int] = Counter()

    def add(self, model: str, pages: tuple[int, ...], shares: bool) -> None:
        self._pages[model] = pages
        if shares:
            self._shares.add(model)

    def take(self, model: str, pages: Sequence[int]) -> tuple[int, ...]:
        """Note that these pages are held, or on their way; those of them that have to be brought."""
        if model not in self._shares:
            return tuple(pages)
        contents, new = self._pages[model], []
        for page in pages:
            if not self._holders[contents[page]]:
                new.append(page)
            self._holders[contents[page]] += 1
        return tuple(new)

    def give(self, model: str, pages: Iterable[int], count: int) -> int:
        """`count` pages are held no more; how many frames that frees."""
        if model not in self._shares:
            return count
        contents, freed = self._pages[model], 0
        for page in pages:
            self._holders[contents[page]] -= 1
            freed += not self._holders[contents[page]]
        return freed
