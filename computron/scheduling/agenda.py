"""Models in ascending order of a key that changes: a sorted list with a remembered place for each model."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from computron.scheduling.models import ModelState

Key = tuple[float, ...]


class Agenda:
    """Filing is a binary search and a shift in one flat list, which for thousands of models is a few microseconds."""

    __slots__ = ("_entries", "_filed")

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, ModelState]] = []
        self._filed: dict[int, tuple[Key, int, ModelState]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, model: ModelState) -> bool:
        return model.number in self._filed

    def __iter__(self) -> Iterator[ModelState]:
        return (entry[2] for entry in self._entries)

    def file(self, model: ModelState, key: Key) -> None:
        """Put the model at its key's place, wherever it was before."""
        entry = self._filed.get(model.number)
        if entry is not None:
            if entry[0] == key:
                return
            del self._entries[bisect_left(self._entries, entry)]
        entry = (key, model.number, model)
        self._filed[model.number] = entry
        insort(self._entries, entry)

    def drop(self, model: ModelState) -> None:
        """Take the model off, if it is on."""
        entry = self._filed.pop(model.number, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def first(self) -> ModelState | None:
        return self._entries[0][2] if self._entries else None

    def first_key(self) -> Key | None:
        return self._entries[0][0] if self._entries else None

    def first_above(self, value: float, measure: Callable[[Key], float]) -> Key | None:
        """The first key whose measure, which must not fall along the order, is above `value`."""
        place = bisect_right(self._entries, value, key=lambda entry: measure(entry[0]))
        return self._entries[place][0] if place < len(self._entries) else None

    def head(self, count: int) -> list[ModelState]:
        """At most `count` models, the first of the order."""
        return [entry[2] for entry in self._entries[:count]]
