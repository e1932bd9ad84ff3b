"""Distinct pages under a byte budget: in the arena while they fit, on disk when they do not."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from computron import _transfer
from computron.errors import CheckpointError
from computron.memory.arena import Arena, same_blocks, same_bytes
from computron.memory.contents import Content, ContentTable
from computron.memory.disk import CheckpointFiles, PageExtent, SpillFile, read_blocks
from computron.memory.images import ImageSource

log = logging.getLogger(__name__)


class LoadAbandoned(Exception):
    """There is no use in loading on: another page failed, or the store is closed."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Contents that a swap reads: their bytes stay where they are until the lease is released.

    `kept`: for contents on disk, the slots that their bytes are also read into.
    """

    image_id: str
    contents: tuple[Content, ...]
    sources: tuple[_transfer.Source, ...]
    from_disk: tuple[Content, ...]
    kept: dict[int, int]


@dataclass(frozen=True, slots=True)
class PageCounts:
    used: int  # bytes of slots in use
    committed: int  # bytes of memory taken from the system
    pages: int
    in_memory: int
    spilled: int
    read_from_disk: int


class PageStore:
    """Thread-safe. Methods that read, write or wait say so; all others are quick.

    A page leaves memory only when it is on disk: in its checkpoint, opened and found unchanged, or in the spill file.
    """

    def __init__(
        self,
        backend: _transfer.Backend,
        *,
        slots: int,
        page_bytes: int,
        spill_directory: Path | None,
        threads: Executor,
        touch_threads: int,
    ) -> None:
        self.page_bytes = page_bytes
        self._arena = Arena(backend, slots, page_bytes, touch_threads)
        self._spill = SpillFile(spill_directory, page_bytes)
        self._files = CheckpointFiles()
        self._table = ContentTable()
        self._threads = threads
        self._changed = threading.Condition()
        self._closed = False
        self._disk_takes = True  # until a write in the background has failed
        self._read_from_disk = 0
        self._writing_ahead = 0

    def reserve(self, abandoned: Callable[[], bool]) -> int:
        """A slot to load a page into. Waits for one, drops the coldest page for it, writes that to disk if need be.

        Raises OutOfMemory if a disk is full, LoadAbandoned if `abandoned()` or the store is closed.
        """
        while True:
            with self._changed:
                if self._closed or abandoned():
                    raise LoadAbandoned
                slot = self._arena.take()
                if slot is not None:
                    return slot
                victim = self._table.coldest()
                if victim is None:
                    self._changed.wait()
                    continue
                if self._is_on_disk(victim):
                    return self._table.displace(victim)
                victim.pins += 1
            self._write_to_spill(victim)

    def wake(self) -> None:
        """Let those who wait look again at whether they are abandoned."""
        with self._changed:
            self._changed.notify_all()

    def touch(self, image_id: str) -> None:
        """The image is wanted now: its pages are the last to leave memory."""
        with self._changed:
            self._table.touch(image_id)

    def commit(self, slot: int, nbytes: int) -> memoryview:
        """The first `nbytes` of a reserved slot, backed by memory. Raises OutOfMemory if the system has none."""
        self._arena.commit(slot)
        return self._arena.buffer(slot, nbytes)

    def locate(self, source: ImageSource, offset: int, nbytes: int) -> tuple[PageExtent, ...] | None:
        """Where a page stands on disk, to be asked before it is read, so that a later change of the file is seen.

        Raises CheckpointError if a file is missing.
        """
        extents = source.extents(offset, nbytes)
        if extents is None:
            return None
        try:
            found = {path: os.stat(path) for path in {extent.path for extent in extents}}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
        with self._changed:
            return tuple(
                PageExtent(e.offset - offset, e.nbytes, self._files.acquire(e.path, found[e.path]), e.file_offset)
                for e in extents
            )

    def free(self, slot: int, extents: tuple[PageExtent, ...] | None) -> None:
        """Take back what `reserve` and `locate` gave."""
        with self._changed:
            self._release_files(extents)
            self._arena.give(slot)
            self._changed.notify_all()

    def intern(self, slot: int, nbytes: int, image_id: str, page: int, extents: tuple[PageExtent, ...] | None) -> int:
        """Give a loaded page its content id: that of an equal content, whose bytes are compared, or a new one.

        Slot and extents belong to the store from here on. Reads from disk if the equal content is there.
        """
        digest = _transfer.page_digest(self._arena.address(slot), nbytes)
        different: set[int] = set()
        while True:
            with self._changed:
                alike = (content for content in self._table.alike(digest, nbytes) if content.id not in different)
                other = next(alike, None)
                if other is None:
                    content = self._table.create(digest, nbytes, image_id, page, slot)
                    content.extents = extents
                    self._changed.notify_all()
                    return content.id
                other.pins += 1
                address = None if other.slot is None else self._arena.address(other.slot)
            same = self._same(other, address, slot)
            with self._changed:
                other.pins -= 1
                self._changed.notify_all()
                if same:
                    other.users[image_id] = min(page, other.users.get(image_id, page))
                    if other.extents is None:
                        other.extents = extents
                    else:
                        self._release_files(extents)
                    if other.slot is None:
                        self._table.place(other, slot)
                    else:
                        self._arena.give(slot)
                    return other.id
                different.add(other.id)

    def forget(self, image_id: str, content_ids: Iterable[int]) -> None:
        """Free the contents that no other image has. Waits for those that are being compared or written."""
        slots = []
        with self._changed:
            for content in map(self._table.__getitem__, content_ids):
                while content.pins and content.users.keys() == {image_id}:
                    self._changed.wait()
                del content.users[image_id]
                if content.users:
                    continue
                self._table.remove(content)
                self._release_files(content.extents)
                if content.spilled is not None:
                    self._spill.release(content.spilled)
                if content.slot is not None:
                    slots.append(content.slot)
            self._table.forget_image(image_id)
        self._arena.discard(slots)
        with self._changed:
            for slot in slots:
                self._arena.give(slot)
            self._changed.notify_all()

    def digest(self, content_id: int) -> bytes:
        with self._changed:
            return self._table[content_id].digest

    def lease(self, image_id: str, content_ids: Sequence[int]) -> Lease:
        """Sources for a swap of these contents, whose image now counts as the one wanted last. Reads nothing.

        Raises CheckpointError if a page has to come from a checkpoint that changed on disk.
        """
        with self._changed:
            self._table.touch(image_id)
            contents = tuple(self._table[content_id] for content_id in content_ids)
            from_disk = tuple(content for content in contents if content.slot is None)
            for content in contents:
                content.pins += 1
            kept: dict[int, int] = {}
            try:
                sources = tuple(self._source(content, image_id, kept) for content in contents)
            except CheckpointError:
                self._unpin(contents, kept.values())
                raise
            return Lease(image_id, contents, sources, from_disk, kept)

    def release(self, lease: Lease, arrived: Collection[int]) -> None:
        """End a lease. `arrived`: ids of the contents whose bytes were read whole."""
        with self._changed:
            unused = []
            for content in lease.contents:
                slot = lease.kept.get(content.id)
                if slot is None:
                    continue
                if content.id in arrived and content.slot is None:
                    self._table.place(content, slot)
                else:
                    unused.append(slot)
            self._unpin(lease.contents, unused)

    def require_unchanged(self, lease: Lease) -> None:
        """Raises CheckpointError if a checkpoint that the lease reads from has changed by now."""
        with self._changed:
            for content in lease.from_disk:
                content.disk_extents(self._spill)

    def nbytes(self, content_ids: Iterable[int]) -> int:
        with self._changed:
            return sum(self._table[content_id].nbytes for content_id in content_ids)

    def counts(self) -> PageCounts:
        with self._changed:
            return PageCounts(
                used=self._arena.used * self.page_bytes,
                committed=self._arena.committed_bytes,
                pages=len(self._table),
                in_memory=self._table.in_slots,
                spilled=self._spill.used,
                read_from_disk=self._read_from_disk,
            )

    def check(self) -> None:
        """Raises AssertionError unless every slot has one owner. For moments without loads and swaps; waits for cold
        pages that are being written to disk."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing_ahead)
            slots = [content.slot for content in self._table if content.slot is not None]
            spilled = [content.spilled for content in self._table if content.spilled is not None]
            assert len(set(slots)) == len(slots) == self._table.in_slots == self._arena.used, "slots leaked"
            assert len(set(spilled)) == len(spilled) == self._spill.used, "slots of the spill file leaked"
            budget = self._arena.slots * self.page_bytes
            assert self._arena.used * self.page_bytes <= budget, "more slots than the budget has"
            assert self._arena.committed_bytes <= budget, "more memory committed than the budget has"
            for content in self._table:
                assert content.slot is not None or content.on_disk, f"content {content.id} is nowhere"
                assert content.users, f"content {content.id} has no user"
                assert not content.pins, f"content {content.id} is pinned"
            files = {extent.file for content in self._table for extent in content.extents or ()}
            assert files == self._files.in_use, "files leaked"

    def stop(self) -> None:
        """Refuse further loads and end those that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give all memory and files back. After `stop`, and once no thread loads."""
        self._files.close()
        self._spill.close()
        self._arena.close()

    def _source(self, content: Content, image_id: str, kept: dict[int, int]) -> _transfer.Source:
        if content.slot is not None:
            return _transfer.Source.pinned(self._arena.address(content.slot))
        extents = content.disk_extents(self._spill)
        self._read_from_disk += 1
        slot = self._slot_now(self._table.heat(image_id))
        if slot is None:
            return _transfer.Source.file(extents)
        kept[content.id] = slot
        return _transfer.Source.file(extents, self._arena.address(slot))

    def _slot_now(self, heat: int) -> int | None:
        """A slot for a page of an image of this heat, if one can be had without waiting."""
        slot = self._arena.take_committed()
        if slot is not None:
            return slot
        victim = self._table.coldest(below=heat)
        if victim is None:
            return None
        if self._is_on_disk(victim):
            return self._table.displace(victim)
        if self._disk_takes:
            self._threads.submit(self._write_ahead, victim)
            victim.pins += 1
            self._writing_ahead += 1
        return None

    def _write_ahead(self, content: Content) -> None:
        try:
            self._write_to_spill(content)
        except Exception:
            self._disk_takes = False
            log.exception("cold pages stay in memory: they cannot be written to disk")
        finally:
            with self._changed:
                self._writing_ahead -= 1
                self._changed.notify_all()

    def _write_to_spill(self, content: Content) -> None:
        """Write a content that the caller has pinned to disk, and unpin it. Raises OutOfMemory if the disk is full."""
        spilled = None
        try:
            with self._changed:
                spilled = self._spill.allocate()
            assert content.slot is not None
            self._spill.write(spilled, self._arena.buffer(content.slot, content.nbytes))
        except BaseException:
            with self._changed:
                if spilled is not None:
                    self._spill.release(spilled)
                self._unpin([content], ())
            raise
        with self._changed:
            content.spilled = spilled
            self._unpin([content], ())

    def _unpin(self, contents: Iterable[Content], slots: Iterable[int]) -> None:
        for content in contents:
            content.pins -= 1
        for slot in slots:
            self._arena.give(slot)
        self._changed.notify_all()

    def _is_on_disk(self, content: Content) -> bool:
        """Whether the content can be read from disk, its checkpoint being open and unchanged."""
        if not content.on_disk:
            return False
        try:
            content.disk_extents(self._spill)
        except CheckpointError:  # the file has said so in the log; the page itself is safe, for it is in memory
            self._release_files(content.extents)
            content.extents = None
            return False
        return True

    def _same(self, other: Content, address: int | None, slot: int) -> bool:
        """Whether a pinned content, at `address` or on disk, equals what the slot holds."""
        mine = self._arena.address(slot)
        if address is not None:
            return same_bytes(address, mine, other.nbytes)
        try:
            with self._changed:
                extents = other.disk_extents(self._spill)
            return same_blocks(read_blocks(extents, other.nbytes), mine)
        except CheckpointError:  # nobody can tell any more what it was: not the same
            return False

    def _release_files(self, extents: tuple[PageExtent, ...] | None) -> None:
        for extent in extents or ():
            self._files.release(extent.file)
