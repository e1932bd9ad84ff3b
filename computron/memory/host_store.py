"""The host's copy of all images: every distinct page once, under a byte budget, what does not fit on disk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from computron import _transfer
from computron.errors import OutOfMemory
from computron.memory.images import ImageSource, StoredImage
from computron.memory.loading import ImageLoad
from computron.memory.pages import Lease, PageStore


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """Bytes and pages. `shared_pages` need no storage of their own: they are the places in images, beyond the first,
    of each page that stands at several; `shared_bytes_saved` is what they would take."""

    budget: int
    used: int
    committed: int
    images: int
    pages: int
    shared_pages: int
    shared_bytes_saved: int
    on_disk_pages: int  # with no copy in memory
    spilled_pages: int  # in the spill file, in memory too or not
    pages_read_from_disk: int  # by swaps, since the start


class HostStore:
    """`add`, `remove` and `close` block and are not for the event loop's thread; all other methods are quick.

    `budget` and `page_bytes` are bytes; `load_threads` read, hash and compare pages. Pages that no checkpoint holds
    are spilled to a nameless file in `spill_directory`, by default the system's directory for temporary files.
    Raises OutOfMemory if not even one page fits the budget.
    """

    def __init__(
        self,
        backend: _transfer.Backend,
        *,
        budget: int,
        page_bytes: int,
        load_threads: int,
        spill_directory: Path | None,
    ) -> None:
        if budget < page_bytes:
            raise OutOfMemory(f"host.memory is {budget} bytes, less than one page of {page_bytes}")
        self.page_bytes = page_bytes
        self._budget = budget
        self._threads = ThreadPoolExecutor(load_threads, thread_name_prefix="load")
        self._pages = PageStore(
            backend,
            slots=budget // page_bytes,
            page_bytes=page_bytes,
            spill_directory=spill_directory,
            threads=self._threads,
            touch_threads=load_threads,
        )
        self._lock = threading.Condition(threading.Lock())
        self._images: dict[str, StoredImage] = {}
        self._loading: set[str] = set()
        self._leases: Counter[str] = Counter()
        self._uses: Counter[int] = Counter()  # places in images, for each content
        self._shared_pages = 0
        self._shared_bytes = 0
        self._closed = False

    def add(self, image_id: str, source: ImageSource, progress: Callable[[int], None] | None = None) -> StoredImage:
        """Read an image into the store. `progress` is called with the bytes of every page that has been read, from
        loading threads, one call at a time. Where swaps read all of a full store, it waits until one has ended.

        Raises ValueError if the image is here already, CheckpointError if the source cannot be read, OutOfMemory if
        there is no room in memory nor on disk. Nothing of the image is left behind then.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the host store is closed")
            if image_id in self._images or image_id in self._loading:
                raise ValueError(f"{image_id} is already in the host store")
            self._loading.add(image_id)
        try:
            image = self._load(image_id, source, progress)
            with self._lock:
                self._images[image_id] = image
                self._count_uses(image)
        finally:
            with self._lock:
                self._loading.remove(image_id)
                self._lock.notify_all()
        return image

    def _load(self, image_id: str, source: ImageSource, progress: Callable[[int], None] | None) -> StoredImage:
        load = ImageLoad(self._pages, image_id, source, progress)
        self._pages.touch(image_id)
        try:
            return load.run(self._threads)
        except BaseException:
            self._pages.forget(image_id, load.contents)
            raise

    def remove(self, image_id: str) -> None:
        """Forget an image, with the pages that no other image has.

        Raises KeyError if it is not here, RuntimeError while a swap reads it.
        """
        with self._lock:
            if self._leases[image_id]:
                raise RuntimeError(f"{image_id} cannot leave the host store while a swap reads it")
            image = self._images.pop(image_id)
            self._discount_uses(image)
        self._pages.forget(image_id, set(image.pages))

    def _count_uses(self, image: StoredImage) -> None:
        for content, nbytes in zip(image.pages, image.page_sizes, strict=True):
            if self._uses[content]:
                self._shared_pages += 1
                self._shared_bytes += nbytes
            self._uses[content] += 1

    def _discount_uses(self, image: StoredImage) -> None:
        for content, nbytes in zip(image.pages, image.page_sizes, strict=True):
            self._uses[content] -= 1
            if self._uses[content]:
                self._shared_pages -= 1
                self._shared_bytes -= nbytes
            else:
                del self._uses[content]

    def digest(self, content_id: int) -> bytes:
        """`_transfer.page_digest` of the content as it was loaded."""
        return self._pages.digest(content_id)

    def lease(self, image_id: str, content_ids: Sequence[int]) -> Lease:
        """Sources for a swap of these contents of an image, which now counts as the one wanted last. Reads nothing:
        pages on disk are read by the transfer, and kept in memory if a slot is free or a colder page can go.

        Raises CheckpointError if a page has to come from a checkpoint that changed on disk.
        """
        with self._lock:
            lease = self._pages.lease(image_id, content_ids)
            self._leases[image_id] += 1
            return lease

    def release(self, lease: Lease, arrived: Collection[int]) -> None:
        """End a lease. `arrived`: ids of the contents whose bytes were read whole."""
        with self._lock:
            self._leases[lease.image_id] -= 1
        self._pages.release(lease, arrived)

    def require_unchanged(self, lease: Lease) -> None:
        """Raises CheckpointError if a checkpoint that the lease reads from has changed by now."""
        self._pages.require_unchanged(lease)

    def statistics(self) -> HostStatistics:
        with self._lock:
            images, shared_pages, shared_bytes = len(self._images), self._shared_pages, self._shared_bytes
        counts = self._pages.counts()
        return HostStatistics(
            budget=self._budget,
            used=counts.used,
            committed=counts.committed,
            images=images,
            pages=counts.pages,
            shared_pages=shared_pages,
            shared_bytes_saved=shared_bytes,
            on_disk_pages=counts.pages - counts.in_memory,
            spilled_pages=counts.spilled,
            pages_read_from_disk=counts.read_from_disk,
        )

    def check(self) -> None:
        """Raises AssertionError if the budget is exceeded or the books do not agree: a slot with two owners or none,
        a page that is nowhere, wrong counts. Reads no page. For moments without loads and swaps."""
        assert not any(self._leases.values()), "a lease was not released"
        self._pages.check()
        counts = self._pages.counts()
        assert counts.used <= self._budget, f"{counts.used} bytes used of a budget of {self._budget}"
        assert counts.committed <= self._budget, f"{counts.committed} bytes committed of a budget of {self._budget}"
        with self._lock:
            places = [page for image in self._images.values() for page in image.pages]
            saved = sum(image.nbytes for image in self._images.values()) - self._pages.nbytes(self._uses)
            assert Counter(places) == self._uses, "places of pages are counted wrongly"
            assert self._shared_pages == len(places) - len(self._uses), "shared pages are counted wrongly"
            assert self._shared_bytes == saved, "shared bytes are counted wrongly"

    def close(self) -> None:
        """End loads with an error and give all memory and files back. No swap may be under way. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._pages.stop()
        with self._lock:
            self._lock.wait_for(lambda: not self._loading)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pages.close()
