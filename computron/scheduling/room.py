"""Finding frames: a plan of what to take from whom, made first and carried out only if it is enough."""

from __future__ import annotations

from computron.scheduling.actions import Action, Evict, EvictionReason, Preempt, SetCache
from computron.scheduling.board import Board
from computron.scheduling.models import ModelState, frames_for
from computron.scheduling.waiting import Ticket


class RoomPlan:
    """Takes, until `need` more frames would be free: spare cache, pages, sequences. Nothing happens before `commit`.

    `keep`: contents that must stay, because the model that the room is for would map them.
    A page that several models map frees its frame only if all of them are asked for it; otherwise it stays mapped.
    """

    def __init__(self, board: Board, need: int, keep: set[int]) -> None:
        self._board = board
        self._keep = keep
        self._need = need
        self.gained = 0
        self._offered: dict[int, list[tuple[ModelState, int]]] = {}  # content -> those asked for it so far
        self._evictions: dict[str, list[int]] = {}
        self._left: dict[str, list[int]] = {}  # model with shared pages -> those that it has not been asked for
        self._last: dict[str, int] = {}  # model without shared pages -> how many of its last ones leave
        self._caches: dict[str, int] = {}
        self._preempted: list[Ticket] = []

    @property
    def enough(self) -> bool:
        return self.gained >= self._need

    @property
    def preempts(self) -> bool:
        """Does it take sequences?"""
        return bool(self._preempted)

    def givers(self) -> list[ModelState]:
        """The models whose pages it takes."""
        names = (*self._last, *(name for name, pages in self._evictions.items() if pages))
        return [self._board.models[name] for name in names]

    def take_spare_cache(self, model: ModelState) -> None:
        """Cache frames that no sequence of the model needs."""
        self._shrink(model, model.cache_need())

    def take_pages(self, model: ModelState, most: int | None) -> None:
        """Pages from the end of the model, as many as are needed, but no more than `most`; None: all, needed or not.

        Those of one that has given before are those before them.
        """
        residency = model.residency
        if not residency.shared:
            self._take_last(model, most)
            return
        if model.name not in self._left:
            self._left[model.name] = list(residency.mapped_pages())
        left = self._left[model.name]
        taken = self._evictions.setdefault(model.name, [])
        holders = self._board.ledger.holders
        last = 0 if most is None else max(0, len(left) - most)
        while len(left) > last and (most is None or not self.enough):
            page = left.pop()
            content = residency.contents[page]
            if content in self._keep:
                continue
            count = holders(content)
            if count == 1:
                self.gained += 1
                taken.append(page)
                continue
            asked = self._offered.setdefault(content, [])
            asked.append((model, page))
            if len(asked) == count:
                self.gained += 1
                for holder, shared in asked:
                    self._evictions[holder.name].append(shared)

    def _take_last(self, model: ModelState, most: int | None) -> None:
        """Each of its pages is the only one with its content, so that counting them is enough."""
        taken = self._last.get(model.name, 0)
        count = model.residency.count - taken
        if most is not None:
            count = min(count, most, self._need - self.gained)
        if count:
            self._last[model.name] = taken + count
            self.gained += count

    def take_sequence(self, ticket: Ticket) -> None:
        """Drop a paused sequence's cache; it will be computed anew."""
        self._preempted.append(ticket)
        model = ticket.model
        left = model.held_blocks - sum(other.blocks for other in self._preempted if other.model is model)
        self._shrink(model, frames_for(left, model.spec.blocks_per_frame) if model.spec.blocks_per_frame else 0)

    def _shrink(self, model: ModelState, frames: int) -> None:
        now = self._caches.get(model.name, model.residency.cache)
        if frames < now:
            self.gained += now - frames
            self._caches[model.name] = frames

    def commit(self, reason: EvictionReason) -> list[Action]:
        """Carry the plan out on the board, and give the actions that do so on the device."""
        board = self._board
        actions: list[Action] = []
        for ticket in self._preempted:
            board.requeue(ticket)
            actions.append(Preempt(ticket.model.name, ticket.request.id))
        for name, frames in self._caches.items():
            board.set_cache(board.models[name], frames)
            actions.append(SetCache(name, frames))
        for name, pages in self._evictions.items():
            if pages:
                actions.append(self._evict(name, tuple(sorted(pages, reverse=True)), reason))
        for name, count in self._last.items():
            actions.append(self._evict(name, board.models[name].residency.last_pages(count), reason))
        return actions

    def _evict(self, name: str, pages: tuple[int, ...], reason: EvictionReason) -> Evict:
        self._board.evict(self._board.models[name], pages)
        return Evict(name, pages, reason)
