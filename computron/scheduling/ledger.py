"""Who holds which frame of the device. The authority on what fits: nothing is ordered that it does not allow.

A frame holds one page's content, or a piece of one model's KV cache. Contents are counted by their holders, the
(model, page) pairs that map them, from the moment on when a transfer is ordered; a content leaves its frame with its
last holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import compress

from computron.scheduling.actions import Urgency


class Swap:
    """A transfer under way.

    frames: those that it fills; its other pages were on the device and are only mapped.
    rest: frames that are still to be filled when it has ended. completing: no page lacks then, and so a step may wait
        for its end.
    """

    __slots__ = ("alone", "cancelled", "completing", "expected_end", "frames", "ordered", "pages", "rest", "urgency")

    def __init__(
        self,
        pages: tuple[int, ...],
        frames: int,
        urgency: Urgency,
        now: float,
        expected_end: float,
        *,
        rest: int,
        completing: bool,
    ) -> None:
        self.pages = pages
        self.frames = frames
        self.rest = rest
        self.completing = completing
        self.urgency = urgency
        self.ordered = now
        self.expected_end = expected_end
        self.cancelled = False
        self.alone = True  # no other transfer shared the link with it: its time tells the bandwidth


class Residency:
    """What of one model is on the device. `swap`: its transfer, whose pages do not count as mapped yet.

    shared: those of its pages whose content another page, here or elsewhere, has or once had, in ascending order.
    """

    __slots__ = ("_numbers", "cache", "contents", "count", "mapped", "name", "shared", "swap")

    def __init__(self, name: str, contents: tuple[int, ...]) -> None:
        self.name = name
        self.contents = contents
        self.mapped = bytearray(len(contents))
        self.count = 0
        self.cache = 0
        self.swap: Swap | None = None
        self.shared: list[int] = []
        self._numbers = _numbers(len(contents))

    @property
    def complete(self) -> bool:
        return self.count == len(self.contents)

    def unmapped(self, most: int | None = None) -> tuple[int, ...]:
        """The pages that are not mapped, in ascending order; the first ones, if `most` tells how many."""
        if self._ends_at_count():
            return self._numbers[self.count : None if most is None else self.count + most]
        return tuple(page for page, mapped in enumerate(self.mapped) if not mapped)[:most]

    def mapped_pages(self) -> tuple[int, ...]:
        if self._ends_at_count():
            return self._numbers[: self.count]
        return tuple(compress(self._numbers, self.mapped))

    def last_pages(self, count: int) -> tuple[int, ...]:
        """The last `count` of the pages that are mapped, the last one first."""
        if self._ends_at_count():
            return self._numbers[self.count - count : self.count][::-1]
        return self.mapped_pages()[self.count - count :][::-1]

    def _ends_at_count(self) -> bool:
        """Are the pages mapped that come first, and no others? So it is unless a transfer ended before its time."""
        return self.mapped.find(0) in (self.count, -1)


@cache
def _numbers(count: int) -> tuple[int, ...]:
    """The numbers of so many pages: slices of one tuple cost much less than counting anew."""
    return tuple(range(count))


class Ledger:
    """Only shared contents are counted one by one. Of all others a model's count of pages says what they take."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.free = frames
        self.pinned: Counter[int] = Counter()  # contents that stay, by the number of pinned pages with that content
        self._holders: dict[int, int] = {}  # of shared contents
        self._in_flight: dict[int, Residency] = {}  # shared contents
        self._owner: dict[int, Residency | None] = {}  # None: shared, once and for ever, which is only a loss of speed

    def add(self, residency: Residency) -> None:
        """Learn of a model, and of the contents that it shares. Those of other models may be on the device already."""
        contents = residency.contents
        shared = self._owner.keys() & contents
        if len(set(contents)) < len(contents):
            shared |= {content for content, count in Counter(contents).items() if count > 1}
        for content in shared:
            owner = self._owner.get(content)
            if owner is not None:
                self._share(owner, shared)
        self._owner.update(dict.fromkeys(contents, residency))
        self._owner.update(dict.fromkeys(shared))
        residency.shared = [page for page, content in enumerate(contents) if content in shared] if shared else []

    def _share(self, owner: Residency, contents: set[int]) -> None:
        """Count from now on those of the model's pages that have these contents."""
        on_the_way = set(owner.swap.pages) if owner.swap is not None else set()
        pages = [
            page for page, content in enumerate(owner.contents) if content in contents and self._owner[content] is owner
        ]
        for page in pages:
            content = owner.contents[page]
            self._owner[content] = None
            if owner.mapped[page] or page in on_the_way:
                self._holders[content] = 1
            if page in on_the_way:
                self._in_flight[content] = owner
        owner.shared = sorted(owner.shared + pages)

    def remove(self, residency: Residency) -> None:
        """Forget a model that holds nothing any more."""
        assert residency.count == residency.cache == 0
        for content in residency.contents:
            if self._owner.get(content) is residency:
                del self._owner[content]

    def holders(self, content: int) -> int:
        """How many pages hold a content that is on the device."""
        return self._holders.get(content, 1)

    def lacking(self, residency: Residency) -> int:
        """Frames that a swap-in of the whole model would fill now."""
        missing = len(residency.contents) - residency.count
        if not residency.shared:
            return missing
        unmapped = [residency.contents[page] for page in residency.shared if not residency.mapped[page]]
        return missing - len(unmapped) + len(set(unmapped) - self._holders.keys())

    def wanted_contents(self, residency: Residency) -> set[int]:
        """Contents that may be on the device, for others, and that a swap-in of this model would map."""
        return {residency.contents[page] for page in residency.shared if not residency.mapped[page]}

    def awaited(self, residency: Residency) -> Residency | None:
        """Another model whose transfer is bringing a content that this one lacks; its end must be waited for."""
        if not self._in_flight:
            return None
        for page in residency.shared:
            owner = self._in_flight.get(residency.contents[page])
            if owner is not None and owner is not residency:
                return owner
        return None

    def room_alone(self, residency: Residency) -> int:
        """Frames left for its cache if nothing but this model and the pinned ones is on the device; may be negative."""
        return self.frames - len(self.pinned.keys() | set(residency.contents))

    def first_lacking(self, residency: Residency, frames: int) -> tuple[int, ...]:
        """The first ones, in image order, of the pages that are not mapped: as many as fill at most so many frames."""
        if not residency.shared:
            return residency.unmapped(frames)
        pages = residency.unmapped()
        filled: set[int] = set()
        for place, page in enumerate(pages):
            content = residency.contents[page]
            if content not in self._holders:
                filled.add(content)
                if len(filled) > frames:
                    return pages[:place]
        return pages

    def order(
        self, residency: Residency, pages: tuple[int, ...], urgency: Urgency, now: float, expected_end: float
    ) -> Swap:
        """A transfer of these pages, the first ones of those that are not mapped; its frames are taken now."""
        assert pages
        assert residency.swap is None
        assert self.awaited(residency) is None
        frames, lacking = len(pages), self.lacking(residency)
        for page in residency.shared:
            if page > pages[-1]:
                break
            if residency.mapped[page]:
                continue
            content = residency.contents[page]
            count = self._holders.get(content, 0)
            if count:
                frames -= 1
            else:
                self._in_flight[content] = residency
            self._holders[content] = count + 1
        assert frames <= self.free, f"{residency.name} needs {frames} frames, {self.free} are free"
        self.free -= frames
        completing = residency.count + len(pages) == len(residency.contents)
        rest = lacking - frames
        residency.swap = Swap(pages, frames, urgency, now, expected_end, rest=rest, completing=completing)
        return residency.swap

    def finish(self, residency: Residency, arrived: Sequence[int]) -> None:
        """The transfer is over: the pages that arrived are mapped, the others give back what they held."""
        swap = residency.swap
        assert swap is not None
        residency.swap = None
        last = swap.pages[-1]
        shared = [page for page in residency.shared if page <= last and not residency.mapped[page]]
        lost = len(swap.pages) - len(arrived)
        if swap.completing and not lost:
            residency.mapped = bytearray(b"\x01" * len(residency.contents))
        else:
            for page in arrived:
                residency.mapped[page] = 1
        residency.count += len(arrived)
        for page in shared:
            self._in_flight.pop(residency.contents[page], None)
        self._give_back(residency, shared, lost)

    def evict(self, residency: Residency, pages: Sequence[int]) -> None:
        shared = [page for page in residency.shared if residency.mapped[page]]
        if pages and pages == residency.last_pages(len(pages)):
            first = pages[-1]
            residency.mapped[first:] = bytes(len(residency.contents) - first)
        else:
            for page in pages:
                assert residency.mapped[page], f"page {page} of {residency.name} is not mapped"
                residency.mapped[page] = 0
        residency.count -= len(pages)
        self._give_back(residency, shared, len(pages))

    def _give_back(self, residency: Residency, shared: list[int], count: int) -> None:
        """So many pages let go of what they held; `shared` are those that held shared contents before."""
        for page in shared:
            if not residency.mapped[page]:
                count -= 1
                self._release(residency.contents[page])
        self.free += count

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
        shared = {content for content, owner in self._owner.items() if owner is None}
        cache = 0
        for residency in residencies:
            pages = [page for page, mapped in enumerate(residency.mapped) if mapped]
            assert len(pages) == residency.count, f"{residency.name}: {len(pages)} mapped, {residency.count} counted"
            if residency.swap is not None:
                assert not set(pages) & set(residency.swap.pages)
                pages += residency.swap.pages
            holders.update(residency.contents[page] for page in pages)
            in_flight.update(content for content, owner in self._in_flight.items() if owner is residency)
            assert residency.shared == [page for page, content in enumerate(residency.contents) if content in shared]
            cache += residency.cache
        counted = {content: count for content, count in holders.items() if content in shared}
        assert counted == self._holders, "the holders of contents disagree with what models map"
        assert all(count == 1 or content in shared for content, count in holders.items()), "a content is shared unseen"
        assert in_flight == self._in_flight.keys()
        used = len(holders) + cache
        assert self.free == self.frames - used >= 0, f"{self.free} frames free, {used} of {self.frames} used"
