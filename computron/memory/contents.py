"""Every distinct page once: which contents there are, who uses them, where their bytes are. No I/O."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from computron.memory.disk import PageExtent, SpillFile


@dataclass(slots=True, eq=False)
class Content:
    """One distinct page. Its bytes are in `slot` of the arena, in `extents` of checkpoints, in `spilled` of the spill
    file, or in several of them. `users`: the images that have it, each with its first page of it."""

    id: int
    nbytes: int
    digest: bytes
    users: dict[str, int]
    slot: int | None
    extents: tuple[PageExtent, ...] | None = None
    spilled: int | None = None
    pins: int = 0  # while above zero, the bytes stay where they are

    @property
    def on_disk(self) -> bool:
        return self.extents is not None or self.spilled is not None

    def disk_extents(self, spill: SpillFile) -> list[tuple[int, int, int, int]]:
        """(offset in page, nbytes, descriptor, file offset) of its bytes on disk.

        Raises CheckpointError if the checkpoint is no longer what was loaded.
        """
        if self.spilled is not None:
            return [(0, self.nbytes, *spill.location(self.spilled))]
        assert self.extents is not None
        return [(e.offset, e.nbytes, e.file.descriptor(), e.file_offset) for e in self.extents]


@dataclass(slots=True)
class ContentTable:
    """All contents. The caller holds the store's lock."""

    _by_id: dict[int, Content] = field(default_factory=dict)
    _by_digest: dict[tuple[bytes, int], list[Content]] = field(default_factory=dict)
    in_slots: int = 0
    _heat: dict[str, int] = field(default_factory=dict)
    _clock: int = 0
    _next_id: int = 0
    # A heap of (*rank, content id), the coldest first. An entry may be out of date until it comes to the top.
    _ranking: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Content]:
        return iter(self._by_id.values())

    def __getitem__(self, content_id: int) -> Content:
        return self._by_id[content_id]

    def touch(self, image_id: str) -> None:
        """The image is wanted now: its pages are the last to go to disk."""
        self._clock += 1
        self._heat[image_id] = self._clock

    def forget_image(self, image_id: str) -> None:
        self._heat.pop(image_id, None)

    def alike(self, digest: bytes, nbytes: int) -> Sequence[Content]:
        """Contents of this digest and size; more than one only where different bytes collide."""
        return self._by_digest.get((digest, nbytes), ())

    def create(self, digest: bytes, nbytes: int, image_id: str, page: int, slot: int) -> Content:
        content = Content(self._next_id, nbytes, digest, {image_id: page}, None)
        self._next_id += 1
        self._by_id[content.id] = content
        self._by_digest.setdefault((digest, nbytes), []).append(content)
        self.place(content, slot)
        return content

    def remove(self, content: Content) -> None:
        """Forget a content that no image uses; its slots are the caller's to free."""
        del self._by_id[content.id]
        same = self._by_digest[content.digest, content.nbytes]
        same.remove(content)
        if not same:
            del self._by_digest[content.digest, content.nbytes]
        if content.slot is not None:
            self.in_slots -= 1

    def place(self, content: Content, slot: int) -> None:
        assert content.slot is None
        content.slot = slot
        self.in_slots += 1
        heapq.heappush(self._ranking, (*self._rank(content), content.id))
        if len(self._ranking) > 2 * self.in_slots + 64:
            held = (other for other in self._by_id.values() if other.slot is not None)
            self._ranking = [(*self._rank(other), other.id) for other in held]
            heapq.heapify(self._ranking)

    def displace(self, content: Content) -> int:
        """Take the content out of its slot; it must be on disk."""
        assert content.slot is not None
        assert content.on_disk
        assert not content.pins
        slot, content.slot = content.slot, None
        self.in_slots -= 1
        return slot

    def coldest(self, below: int | None = None) -> Content | None:
        """The least valuable content in a slot that is not pinned: of the image least recently wanted, its last page.

        `below`: only of images colder than this.
        """
        pinned = []
        victim = None
        while self._ranking and victim is None:
            entry = self._ranking[0]
            content = self._by_id.get(entry[2])
            if content is None or content.slot is None:
                heapq.heappop(self._ranking)
            elif (rank := self._rank(content)) != entry[:2]:  # wanted since it was entered
                heapq.heapreplace(self._ranking, (*rank, content.id))
            elif content.pins:
                pinned.append(heapq.heappop(self._ranking))
            else:
                victim = content
        for entry in pinned:
            heapq.heappush(self._ranking, entry)
        if victim is None or (below is not None and self._rank(victim)[0] >= below):
            return None
        return victim

    def heat(self, image_id: str) -> int:
        return self._heat[image_id]

    def _rank(self, content: Content) -> tuple[int, int]:
        hottest = max(content.users, key=self._heat.__getitem__)
        return self._heat[hottest], -content.users[hottest]
