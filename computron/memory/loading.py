"""One image on its way into the host store: its pages are read, hashed and interned in parallel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait

from computron.memory.images import ImageSource, StoredImage, pages_of_segments
from computron.memory.pages import LoadAbandoned, PageStore


class ImageLoad:
    def __init__(
        self, pages: PageStore, image_id: str, source: ImageSource, progress: Callable[[int], None] | None
    ) -> None:
        self._pages = pages
        self._image_id = image_id
        self._source = source
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._failed = False
        nbytes, page_bytes = source.nbytes, pages.page_bytes
        self._sizes = tuple(min(page_bytes, nbytes - start) for start in range(0, nbytes, page_bytes))
        self._contents: list[int | None] = [None] * len(self._sizes)

    @property
    def contents(self) -> set[int]:
        """Ids of the contents that have been interned so far."""
        return {content for content in self._contents if content is not None}

    def run(self, threads: Executor) -> StoredImage:
        """Load all pages. Raises what the first page that failed raised; no page is being loaded any more then."""
        futures: list[Future[None]] = []
        try:
            futures.extend(threads.submit(self._load, page) for page in range(len(self._sizes)))
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            self._stop(futures)
        for future in futures:
            if not future.cancelled() and (error := future.exception()) and not isinstance(error, LoadAbandoned):
                raise error
        if None in self._contents:
            raise RuntimeError(f"the host store was closed while {self._image_id} was loaded")
        return StoredImage(
            id=self._image_id,
            nbytes=self._source.nbytes,
            page_bytes=self._pages.page_bytes,
            pages=tuple(content for content in self._contents if content is not None),
            page_sizes=self._sizes,
            segments=pages_of_segments(self._source.segment_ends, self._pages.page_bytes),
        )

    def _stop(self, futures: list[Future[None]]) -> None:
        if any(not future.done() or future.cancelled() or future.exception() for future in futures):
            self._failed = True
            self._pages.wake()
            for future in futures:
                future.cancel()
            wait(futures)

    def _load(self, page: int) -> None:
        try:
            slot = self._pages.reserve(lambda: self._failed)
            extents = None
            try:
                nbytes = self._sizes[page]
                start = page * self._pages.page_bytes
                extents = self._pages.locate(self._source, start, nbytes)
                self._source.read_into(start, self._pages.commit(slot, nbytes))
            except BaseException:
                self._pages.free(slot, extents)
                raise
            self._contents[page] = self._pages.intern(slot, nbytes, self._image_id, page, extents)
            if self._progress is not None:
                with self._progress_lock:
                    self._progress(nbytes)
        except BaseException:
            self._failed = True
            raise
