"""One conformance suite for every backend: host, CUDA over the stand-in driver, CUDA on a GPU (marker `gpu`)."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from computron import _transfer
from computron._transfer import AddressRange, Backend, DevicePool, HostMemory, Source, Transfer, TransferEngine

ROOT = Path(__file__).parents[2]
LIVING = ("contexts", "allocations", "mappings", "registered", "streams", "events")


class StandinDriver:
    """The knobs of csrc/standin, and its functions for tests that need streams of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.computron_standin_count.restype = ctypes.c_uint64
        self.library.computron_standin_delay.argtypes = [ctypes.c_uint64]
        self._resolve = self.library.cuGetProcAddress_v2

    def count(self, name: str) -> int:
        return int(self.library.computron_standin_count(name.encode()))

    def hold(self, held: bool) -> None:
        self.library.computron_standin_hold(int(held))

    def refuse_modules(self) -> None:
        self.library.computron_standin_refuse_modules(1)

    def delay(self, seconds: float) -> None:
        self.library.computron_standin_delay(int(seconds * 1e6))

    def reset(self) -> None:
        self.library.computron_standin_reset()

    def call(self, name: str, *values: Any) -> None:
        function, status = ctypes.c_void_p(), ctypes.c_int()
        self._resolve(name.encode(), ctypes.byref(function), 12000, ctypes.c_uint64(0), ctypes.byref(status))
        assert function.value, name
        result = ctypes.CFUNCTYPE(ctypes.c_int)(function.value)(*values)
        assert result == 0, f"{name} returned {result}"


def build_standin() -> StandinDriver:
    command = [sys.executable, "setup.py", "-q", "build_standin"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return StandinDriver(Path(built.stdout.splitlines()[-1]))


@pytest.fixture(scope="session")
def standin() -> StandinDriver:
    driver = build_standin()
    _ = _transfer.cuda_backend(library=str(driver.path)).free_memory  # opens the file that it keeps for good
    return driver


class Device:
    """A backend under test, and short ways to make what tests need. Everything is closed in the end."""

    chunks_per_frame = 4

    def __init__(self, name: str, standin: StandinDriver | None, copy_threads: int = 1) -> None:
        self.name = name
        self.copy_threads = copy_threads
        self.standin = standin
        self.backend = self.make_backend()
        self.frame = max(64 << 10, self.backend.granularity)
        self.chunk = self.frame // self.chunks_per_frame
        self.random = np.random.default_rng(0)
        self._closing: list[Any] = []

    @property
    def has_streams(self) -> bool:
        return self.backend.kind == "cuda"

    @property
    def is_real(self) -> bool:
        return self.name == "cuda"

    def make_backend(self) -> Backend:
        if self.name == "host":
            return _transfer.host_backend(copy_threads=self.copy_threads)
        return _transfer.cuda_backend(library=str(self.standin.path) if self.standin else None)

    def slow_down(self, seconds: float) -> None:
        """From now on every chunk takes at least so long."""
        if self.is_real:
            pytest.skip("a real link cannot be slowed down")
        if self.standin is None:
            self.backend = _transfer.host_backend(link_latency=seconds, copy_threads=self.copy_threads)
        else:
            self.standin.delay(seconds)

    def demand_faults(self) -> None:
        if self.is_real:
            pytest.skip("a real device cannot be made to fail")

    def pool(self, frames: int = 8) -> DevicePool:
        return self._closed_later(DevicePool(self.backend, self.frame, frames))

    def range(self, pool: DevicePool, slots: int) -> AddressRange:
        return self._closed_later(AddressRange(pool, slots * self.frame))

    def memory(self, pages: int, *, slab_pages: int = 0) -> HostMemory:
        """Committed, with random bytes in it."""
        memory = HostMemory(self.backend, pages * self.frame, slab_bytes=slab_pages * self.frame)
        memory.commit(0, memory.nbytes, 2)
        memory.buffer(0, memory.nbytes)[:] = self.bytes(memory.nbytes)
        return self._closed_later(memory)

    def engine(self, pool: DevicePool, **options: Any) -> TransferEngine:
        options.setdefault("chunk_bytes", self.chunk)
        return self._closed_later(TransferEngine(self.backend, pool, **options))

    def bytes(self, nbytes: int) -> bytes:
        return self.random.bytes(nbytes)

    def page(self, memory: HostMemory, index: int) -> bytes:
        return bytes(memory.buffer(index * self.frame, self.frame))

    def pinned(self, memory: HostMemory, *pages: int) -> list[Source]:
        return [Source.pinned(memory.address + page * self.frame) for page in pages]

    def send(
        self, engine: TransferEngine, memory: HostMemory, frames: list[int], first_page: int = 0, **options: Any
    ) -> Transfer:
        """Whole pages of `memory`, from `first_page` on, into `frames`, as one segment."""
        count = len(frames)
        pages = self.pinned(memory, *range(first_page, first_page + count))
        return engine.submit(frames, pages, [self.frame] * count, [count], **options)

    def close(self) -> None:
        for thing in reversed(self._closing):
            thing.close()
        self._closing.clear()

    def _closed_later(self, thing: Any) -> Any:
        self._closing.append(thing)
        return thing


BACKENDS = ["host", "host-2-threads", "standin", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    name: str = request.param
    if name == "cuda":
        reason = _transfer.cuda_unavailable_reason()
        if reason is not None:
            pytest.skip(reason)
    driver: StandinDriver | None = request.getfixturevalue("standin") if name == "standin" else None
    before = {key: driver.count(key) for key in LIVING} if driver else {}
    device = Device("host", None, 2) if name == "host-2-threads" else Device(name, driver)
    descriptors = len(os.listdir("/proc/self/fd"))
    yield device
    if driver:
        driver.hold(False)
        driver.delay(0)
    device.close()
    del device.backend
    gc.collect(1)
    if not device.is_real:  # a real driver opens what it likes when it likes
        assert len(os.listdir("/proc/self/fd")) <= descriptors, "file descriptors leak"
    if driver:
        driver.reset()
        leaked = {key: driver.count(key) - before[key] for key in LIVING}
        assert not any(leaked.values()), f"the driver still holds {leaked}"


@pytest.fixture
def host_only(device: Device) -> Device:
    if device.name != "host":
        pytest.skip("of the host backend alone")
    return device


@pytest.fixture
def standin_only(device: Device) -> Device:
    if device.standin is None:
        pytest.skip("needs the stand-in driver")
    return device
