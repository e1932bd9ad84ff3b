"""Image sources and stores for the tests of memory."""

from __future__ import annotations

import random
import select
import threading
from pathlib import Path

import pytest
import torch

from computron import _transfer
from computron.memory.host_store import HostStore
from computron.memory.images import FileExtent
from computron.memory.swapper import Swapper

PAGE = 64 << 10


class BytesSource:
    """An image that no file holds."""

    def __init__(self, data: bytes, segment_ends=None) -> None:
        self.data = data
        self.nbytes = len(data)
        self.segment_ends = segment_ends or (len(data),)

    def read_into(self, offset, buffer) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def extents(self, offset, nbytes):
        return None


class FileSource(BytesSource):
    """An image in a file like a checkpoint's: behind a header, and with gaps that the file does not have."""

    HEADER = 1234

    def __init__(self, path: Path, data: bytes, segment_ends=None, gap_every=3 * PAGE // 2, gap=100) -> None:
        image = bytearray(data)
        packed = bytearray(self.HEADER)
        self._extents = []
        for start in range(0, len(data), gap_every):
            end = min(start + gap_every, len(data))
            used = max(start, end - gap)
            self._extents.append(FileExtent(start, used - start, path, len(packed)))
            packed += data[start:used]
            image[used:end] = bytes(end - used)
        path.write_bytes(packed)
        super().__init__(bytes(image), segment_ends)

    def extents(self, offset, nbytes):
        found = []
        for extent in self._extents:
            start, end = max(extent.offset, offset), min(extent.offset + extent.nbytes, offset + nbytes)
            if start < end:
                found.append(FileExtent(start, end - start, extent.path, extent.file_offset + start - extent.offset))
        return found


class Held:
    """Passes reads through, once it is let go."""

    def __init__(self, source) -> None:
        self._source = source
        self.go = threading.Event()
        self.nbytes, self.segment_ends, self.extents = source.nbytes, source.segment_ends, source.extents

    def read_into(self, offset, buffer) -> None:
        assert self.go.wait(30)
        self._source.read_into(offset, buffer)


def random_bytes(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


class Sources:
    """What tests make images of; available as the fixture `sources`."""

    page = PAGE
    held = Held
    in_memory = BytesSource

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = 0

    @staticmethod
    def data(pages: float, seed: int) -> bytes:
        return random_bytes(int(pages * PAGE), seed)

    @staticmethod
    def pages_of(data: bytes) -> dict[int, bytes]:
        """What lies on each page of an image of these bytes."""
        return {start // PAGE: data[start : start + PAGE] for start in range(0, len(data), PAGE)}

    def random(self, pages: float, seed: int, segment_ends=None) -> BytesSource:
        return BytesSource(self.data(pages, seed), segment_ends)

    def file(self, pages: float, seed: int, segment_ends=None) -> FileSource:
        return self.file_of(self.data(pages, seed), segment_ends)

    def file_of(self, data: bytes, segment_ends=None) -> FileSource:
        self._files += 1
        return FileSource(self._folder / f"checkpoint-{self._files}", data, segment_ends)


@pytest.fixture
def sources(tmp_path) -> Sources:
    return Sources(tmp_path)


@pytest.fixture
def backend() -> _transfer.Backend:
    return _transfer.host_backend()


@pytest.fixture
def read_image(backend):
    """The bytes of an image as swaps would read them."""

    def read(store: HostStore, image) -> bytes:
        pool = _transfer.DevicePool(backend, PAGE, 1)
        engine = _transfer.TransferEngine(backend, pool, chunk_bytes=PAGE)
        (frame,) = pool.allocate(1)
        data = []
        for content, size in zip(image.pages, image.page_sizes, strict=True):
            lease = store.lease(image.id, [content])
            transfer = engine.submit([frame], lease.sources, [size], [1])
            assert transfer.wait(30)
            assert transfer.state == "done", transfer.error
            store.release(lease, {content})
            data.append(pool.read(frame, 0, size))
        engine.close()
        pool.close()
        return b"".join(data)

    return read


@pytest.fixture
def make_store(backend, tmp_path):
    """Stores of so many pages; they must be sound at the end."""
    stores = []

    def make(pages: int, *, load_threads: int = 3, on=None) -> HostStore:
        store = HostStore(
            on or backend,
            budget=pages * PAGE,
            page_bytes=PAGE,
            load_threads=load_threads,
            spill_directory=tmp_path / "spill",
        )
        stores.append(store)
        return store

    yield make
    for store in stores:
        if not store._closed:
            store.check()
        store.close()


@pytest.fixture
def make_swapper(backend, make_store):
    """Swappers of so many frames; they must be sound at the end, and are closed before the stores."""
    swappers = []

    def make(store: HostStore, frames: int, *, verify=False, on=None, chunk_bytes=PAGE // 2) -> Swapper:
        swapper = Swapper(
            on or backend,
            store,
            device_memory=frames * PAGE,
            page_bytes=PAGE,
            chunk_bytes=chunk_bytes,
            verify=verify,
        )
        swappers.append(swapper)
        return swapper

    yield make
    for swapper in swappers:
        if not swapper._closed:
            swapper.check()
        swapper.close()


def finish(swapper: Swapper, count: int = 1):
    """Outcomes of the next `count` swaps to end."""
    poller = select.poll()
    poller.register(swapper.completions_fd, select.POLLIN)
    outcomes = []
    while len(outcomes) < count:
        assert poller.poll(30_000), "no completion came"
        outcomes.extend(swapper.completions())
    return outcomes


@pytest.fixture(name="finish")
def finish_fixture():
    return finish


@pytest.fixture
def device_bytes():
    """The bytes of resident pages of a registered image, through its address range as torch sees it."""

    def read(swapper: Swapper, registered, pages) -> dict[int, bytes]:
        swapper._mapper.drain()
        view = torch.from_dlpack(registered.parameters.dlpack())
        sizes = registered.image.page_sizes
        return {page: view[page * PAGE : page * PAGE + sizes[page]].numpy().tobytes() for page in pages}

    return read
