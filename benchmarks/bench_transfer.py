"""How near do transfers come to a plain copy?

Host: chunk sizes and copy threads, each against a plain memmove by as many threads between buffers of the same size
in the same run (`transfer.memcpy_share`: the worst number of threads at the chunk size that the server uses), and how
exactly an emulated link keeps its bandwidth (`transfer.emulated_error`: the worst of 1, 2 and 4 GB/s, as a fraction).

CUDA: chunk sizes against one cuMemcpyHtoDAsync of a large pinned buffer (`transfer.link_share`), and how fast pageable
memory goes through the staging ring.
"""

from __future__ import annotations

import argparse
import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import Report, arguments, uses_cuda

from computron import _transfer
from computron._transfer import Backend, DevicePool, HostMemory, Source, TransferEngine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("transfer.memcpy_share", "transfer.emulated_error")
CUDA_NAMES = ("transfer.link_share",)  # there is neither a memcpy nor an emulated link to compare with
MIB = 1 << 20
PAGE = {"host": MIB, "cuda": 16 * MIB}
CHUNK = {"host": MIB, "cuda": 4 * MIB}  # what the server uses
SWEEP = (64 << 10, 256 << 10, MIB, 4 * MIB, 16 * MIB)
LINKS = (1e9, 2e9, 4e9)


@dataclass
class Rig:
    """Pages in host memory, frames on the device, and an engine between them."""

    backend: Backend
    nbytes: int
    page: int
    chunk: int
    pageable: np.ndarray[Any, Any] | None = None

    def __post_init__(self) -> None:
        pages = self.nbytes // self.page
        self.pool = DevicePool(self.backend, self.page, pages)
        self.frames = self.pool.allocate(pages)
        self.engine = TransferEngine(self.backend, self.pool, chunk_bytes=self.chunk)
        self.memory = HostMemory(self.backend, self.nbytes)
        self.memory.commit(0, self.nbytes, 2)
        self.sources = [Source.pinned(self.memory.address + index * self.page) for index in range(pages)]
        if self.pageable is not None:
            start = self.pageable.ctypes.data
            self.sources = [Source.pageable(start + index * self.page) for index in range(pages)]

    def seconds(self) -> float:
        """Of one transfer of everything."""
        count = len(self.frames)
        transfer = self.engine.submit(self.frames, self.sources, [self.page] * count, [count])
        transfer.wait()
        if transfer.state != "done":
            raise SystemExit(f"the transfer {transfer.state}: {transfer.error}")
        return transfer.seconds

    def close(self) -> None:
        self.engine.close()
        self.memory.close()
        self.pool.close()


class PlainCopy:
    """memmove between two buffers, each thread one large part of them. ctypes releases the GIL."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.source, self.target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        self.part = nbytes // threads
        self.threads = threads

    def seconds(self) -> float:
        begin = threading.Barrier(self.threads + 1)

        def copy(offset: int) -> None:
            begin.wait()
            ctypes.memmove(self.target.ctypes.data + offset, self.source.ctypes.data + offset, self.part)

        copiers = [threading.Thread(target=copy, args=(index * self.part,)) for index in range(self.threads)]
        for copier in copiers:
            copier.start()
        begin.wait()
        start = time.perf_counter()
        for copier in copiers:
            copier.join()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Compared:
    """Medians: seconds of both, and the share of the baseline's speed of each pair of neighbours in time."""

    seconds: float
    baseline: float
    share: float


def alternate(measured: Callable[[], float], baseline: Callable[[], float], rounds: int) -> Compared:
    """Both in turns, so that whatever else the machine does meets both alike."""
    measured(), baseline()
    pairs = [(measured(), baseline()) for _ in range(rounds)]
    return Compared(
        median(first for first, _ in pairs),
        median(second for _, second in pairs),
        median(second / first for first, second in pairs),
    )


def measure_host(report: Report, part: int, rounds: int, threads: list[int]) -> dict[int, list[float]]:
    """Shares of memcpy by number of threads and chunk size."""
    shares: dict[int, list[float]] = {}
    at_default = []
    for count in threads:
        nbytes = part * count  # as much for each thread: memmove changes its ways with the size
        plain = PlainCopy(nbytes, count)
        for chunk in SWEEP:
            backend = _transfer.host_backend(copy_threads=count)
            rig = Rig(backend, nbytes, max(PAGE["host"], chunk), chunk)
            result = alternate(rig.seconds, plain.seconds, rounds)
            rig.close()
            shares.setdefault(count, []).append(result.share)
            if chunk == CHUNK["host"]:
                at_default.append(result.share)
            name = f"transfer.host.threads_{count}.chunk_{chunk >> 10}KiB"
            report.row(name, nbytes / result.seconds / 1e9, "GB/s", nbytes / result.baseline / 1e9, result.share)
    report.row("transfer.memcpy_share", min(at_default), "share", 1.0, min(at_default))
    return shares


def measure_emulated(report: Report, seconds: float) -> None:
    errors = []
    for bandwidth in LINKS:
        nbytes = int(bandwidth * seconds) // PAGE["host"] * PAGE["host"]
        rig = Rig(_transfer.host_backend(link_bandwidth=bandwidth), nbytes, PAGE["host"], CHUNK["host"])
        rig.seconds()
        measured = nbytes / rig.seconds()
        rig.close()
        errors.append(abs(measured / bandwidth - 1))
        report.row(
            f"transfer.emulated.{bandwidth / 1e9:.0f}GBps",
            measured / 1e9,
            "GB/s",
            bandwidth / 1e9,
            measured / bandwidth,
        )
    report.row("transfer.emulated_error", max(errors), "fraction", 0.0, max(errors))


def measure_cuda(report: Report, nbytes: int, rounds: int) -> list[float]:
    """Shares of the link by chunk size."""
    import torch

    backend = _transfer.cuda_backend()
    source, target = (
        torch.ones(nbytes, dtype=torch.uint8).pin_memory(),
        torch.empty(nbytes, dtype=torch.uint8, device=0),
    )

    def plain() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    shares = []
    for chunk in SWEEP:
        rig = Rig(backend, nbytes, PAGE["cuda"], chunk)
        result = alternate(rig.seconds, plain, rounds)
        rig.close()
        shares.append(result.share)
        name = f"transfer.cuda.chunk_{chunk >> 10}KiB"
        report.row(name, nbytes / result.seconds / 1e9, "GB/s", nbytes / result.baseline / 1e9, result.share)
    pageable = Rig(backend, nbytes, PAGE["cuda"], CHUNK["cuda"], np.ones(nbytes, np.uint8))
    result = alternate(pageable.seconds, plain, rounds)
    pageable.close()
    name = "transfer.cuda.pageable"
    report.row(name, nbytes / result.seconds / 1e9, "GB/s", nbytes / result.baseline / 1e9, result.share)
    share = shares[SWEEP.index(CHUNK["cuda"])]
    report.row("transfer.link_share", share, "share", 1.0, share)
    return shares


def main(options: argparse.Namespace) -> None:
    cuda = uses_cuda(options)
    report = Report("Transfers against plain copies", options, CUDA_NAMES if cuda else NAMES)
    if cuda:
        curves = {"pinned": measure_cuda(report, (1 if options.quick else 4) << 30, 5 if options.quick else 15)}
    else:
        part, rounds = (256 * MIB, 12) if options.quick else (512 * MIB, 30)
        by_threads = measure_host(report, part, rounds, options.threads)
        curves = {f"{count} thread{'s' * (count > 1)}": shares for count, shares in by_threads.items()}
        measure_emulated(report, 0.5 if options.quick else 2.0)

    def draw(axes: Axes) -> None:
        for label, shares in curves.items():
            axes.plot([chunk / MIB for chunk in SWEEP], shares, marker="o", label=label)
        axes.set(xscale="log", xlabel="chunk (MiB)", ylabel="share of a plain copy", ylim=(0, None))
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.legend()

    report.plot(draw)
    report.finish()


if __name__ == "__main__":
    main(
        arguments(
            __doc__ or "",
            lambda parser: parser.add_argument(
                "--threads", type=int, nargs="+", default=[1, 2], help="copy threads on the host; default: 1 2"
            ),
        )
    )
