"""Who holds which frame of the device. The authority on what fits: nothing is ordered that it does not allow.

A frame holds one page's content, or a piece of one model's KV cache. Contents are counted by their holders, the
(model, page) pairs that map them, from the moment on when a transfer is ordered; a content leaves its frame with its
last holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from computron.scheduling.actions import Urgency


class Swap:
    """A transfer under way. `frames`: those that it fills; its other pages were on the device and are only mapped."""

    __slots__ = ("alone", "cancelled", "expected_end", "frames", "ordered", "pages", "urgency")

    def __init__(self, pages: tuple[int, ...], frames: int, urgency: Urgency, now: float, expected_end: float) -> None:
        self.pages = pages
        self.frames = frames
        self.urgency = urgency
        self.ordered = now
        self.expected_end = expected_end
        self.cancelled = False
        self.alone = True  # no other transfer shared the link with it: its time tells the bandwidth


class Residency:
    """What of one model is on the device. `swap`: its transfer, whose pages do not count as mapped yet."""

    __slots__ = ("cache", "contents", "count", "mapped", "name", "private", "swap")

    def __init__(self, name: str, contents: tuple[int, ...]) -> None:
        self.name = name
        self.contents = contents
        self.mapped = bytearray(len(contents))
        self.count = 0
        self.cache = 0
        self.swap: Swap | None = None
        self.private = True  # no other page, here or elsewhere, has a content of this model

    @property
    def complete(self) -> bool:
        return self.count == len(self.contents)

    def unmapped(self) -> tuple[int, ...]:
        return tuple(page for page, mapped in enumerate(self.mapped) if not mapped)

    def mapped_pages(self) -> list[int]:
        return [page for page, mapped in enumerate(self.mapped) if mapped]


class Ledger:
    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.free = frames
        self.pinned: Counter[int] = Counter()  # contents that stay, by the number of pinned pages with that content
        self._holders: dict[int, int] = {}
        self._in_flight: dict[int, Residency] = {}
        self._owner: dict[int, Residency | None] = {}  # None: shared, once and for ever, which is only a loss of speed

    def add(self, residency: Residency) -> None:
        """Learn of a model, and of the contents that it shares."""
        for content in residency.contents:
            owner = self._owner.setdefault(content, residency)
            if owner is not residency:
                residency.private = False
                self._owner[content] = None
                if owner is not None:
                    owner.private = False
        if len(set(residency.contents)) < len(residency.contents):
            residency.private = False

    def remove(self, residency: Residency) -> None:
        """Forget a model that holds nothing any more."""
        assert residency.count == residency.cache == 0
        for content in residency.contents:
            if self._owner.get(content) is residency:
                del self._owner[content]

    def holders(self, content: int) -> int:
        return self._holders.get(content, 0)

    def lacking(self, residency: Residency) -> int:
        """Frames that a swap-in of the whole model would fill now."""
        if residency.private:
            return len(residency.contents) - residency.count
        return len(self.absent_contents(residency))

    def absent_contents(self, residency: Residency) -> set[int]:
        holders = self._holders
        return {content for content in residency.contents if content not in holders}

    def wanted_contents(self, residency: Residency) -> set[int]:
        """Contents that are on the device, for others, and that a swap-in of this model would map."""
        if residency.private:
            return set()
        return {content for page, content in enumerate(residency.contents) if not residency.mapped[page]}

    def awaited(self, residency: Residency) -> Residency | None:
        """Another model whose transfer is bringing a content that this one lacks; its end must be waited for."""
        if residency.private or not self._in_flight:
            return None
        for content in residency.contents:
            owner = self._in_flight.get(content)
            if owner is not None and owner is not residency:
                return owner
        return None

    def room_alone(self, residency: Residency) -> int:
        """Frames left for its cache if nothing but this model and the pinned ones is on the device; may be negative."""
        return self.frames - len(self.pinned.keys() | set(residency.contents))

    def order(self, residency: Residency, urgency: Urgency, now: float, expected_end: float) -> Swap:
        """A swap-in of everything that is not mapped; its frames are taken now."""
        assert residency.swap is None
        assert self.awaited(residency) is None
        pages = residency.unmapped()
        frames = 0
        for page in pages:
            content = residency.contents[page]
            count = self._holders.get(content, 0)
            if count == 0:
                self._in_flight[content] = residency
                frames += 1
            self._holders[content] = count + 1
        assert frames <= self.free, f"{residency.name} needs {frames} frames, {self.free} are free"
        self.free -= frames
        residency.swap = Swap(pages, frames, urgency, now, expected_end)
        return residency.swap

    def finish(self, residency: Residency, arrived: Iterable[int]) -> None:
        """The transfer is over: the pages that arrived are mapped, the others give back what they held."""
        swap = residency.swap
        assert swap is not None
        residency.swap = None
        for page in arrived:
            residency.mapped[page] = 1
            residency.count += 1
        for page in swap.pages:
            content = residency.contents[page]
            self._in_flight.pop(content, None)
            if not residency.mapped[page]:
                self._release(content)

    def evict(self, residency: Residency, pages: Sequence[int]) -> None:
        for page in pages:
            assert residency.mapped[page], f"page {page} of {residency.name} is not mapped"
            residency.mapped[page] = 0
            self._release(residency.contents[page])
        residency.count -= len(pages)

    def set_cache(self, residency: Residency, frames: int) -> None:
        self.free += residency.cache - frames
        residency.cache = frames
        assert self.free >= 0

    def _release(self, content: int) -> None:
        left = self._holders[content] - 1
        if left:
            self._holders[content] = left
        else:
            del self._holders[content]
            self.free += 1

    def check(self, residencies: Iterable[Residency]) -> None:
        """Count everything anew. Raises AssertionError where the books disagree."""
        holders: Counter[int] = Counter()
        in_flight: set[int] = set()
        cache = 0
        for residency in residencies:
            pages = residency.mapped_pages()
            assert len(pages) == residency.count, f"{residency.name}: {len(pages)} mapped, {residency.count} counted"
            if residency.swap is not None:
                assert not set(pages) & set(residency.swap.pages)
                pages += residency.swap.pages
            holders.update(residency.contents[page] for page in pages)
            in_flight.update(content for content, owner in self._in_flight.items() if owner is residency)
            cache += residency.cache
        assert holders == self._holders, "the holders of contents disagree with what models map"
        assert in_flight == self._in_flight.keys()
        used = len(holders) + cache
        assert self.free == self.frames - used >= 0, f"{self.free} frames free, {used} of {self.frames} used"
