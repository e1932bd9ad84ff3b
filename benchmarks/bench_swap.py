"""How long does a switch from one model to another take, where the device has room for one?

Two models with the tensors of SmolLM2-135M in bf16 (269 MB each) are swapped in turn, and a fine-tune of the first that
differs in its last six layers. A switch is timed from the order until the last byte can be computed with; partial: the
device has room for one and a half, so that half of each model stays.

Bound: missing bytes / bandwidth of the link, emulated on the host backend, measured in this run on CUDA.
Baseline of swap.vs_write_back: the weights of the leaving model are copied back and those of the coming one are
loaded, tensor by tensor with torch's `copy_`, as Computron did in 2023, without the 10 to 20 ms a switch that its
engine's polling took. What the baseline gains from a link depends on whether both ways can be busy at once; on the
host there is one emulated link of each kind, beside which Computron's own switch is the same, for it uses one way only:
  swap.vs_write_back              half duplex: both ways share one bandwidth, as on an A100, whose 25 GB/s into the
                                  device fall to 11 to 13 while it also copies out. A baseline that keeps its own
                                  bound gives 2.0 / swap.over_bound.
  swap.vs_write_back_full_duplex  full duplex: each way has all of the bandwidth, a tensor leaves while its successor
                                  comes, and the room that this takes is granted. A baseline that keeps its own bound
                                  gives 1.0 / swap.over_bound: what is saved is traffic, not time.
On CUDA there is only swap.vs_write_back: both ways at once over the real link, on two streams, from and to pinned
memory, with room for both models. swap.write_back* show the baselines against their own bounds.
"""

from __future__ import annotations

import argparse
import select
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.utils.dlpack
from _common import Report, arguments, uses_cuda

from computron import _transfer
from computron.memory.host_store import HostStore
from computron.memory.images import FileExtent, StoredImage
from computron.memory.swapper import Swapper

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES: Final = ("swap.over_bound", "swap.partial.over_bound", "swap.vs_write_back")
MIB: Final = 1 << 20
ALIGNMENT: Final = 256
LAYERS: Final = 30
LAYER_SHAPES: Final = (
    *((576,), (576, 576), (192, 576), (192, 576), (576, 576)),
    *((576,), (1536, 576), (1536, 576), (576, 1536)),
)
STAGE_SHAPES: Final = (((49152, 576),), *(LAYER_SHAPES for _ in range(LAYERS)), ((576,),))
TUNED_LAYERS: Final = 6
WARM_UP: Final = 2


@dataclass(frozen=True)
class Tensors:
    """Offset and size in bytes of each tensor of a model, and where each stage ends."""

    places: tuple[tuple[int, int], ...]
    segment_ends: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.segment_ends[-1]


def lay_out() -> Tensors:
    places, ends, offset = [], [], 0
    for shapes in STAGE_SHAPES:
        for shape in shapes:
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            nbytes = 2 * torch.Size(shape).numel()
            places.append((offset, nbytes))
            offset += nbytes
        ends.append(offset)
    return Tensors(tuple(places), tuple(ends))


class SyntheticImage:
    """An ImageSource of random weights."""

    def __init__(self, tensors: Tensors, seed: int, frozen: SyntheticImage | None = None) -> None:
        self.nbytes = tensors.nbytes
        self.segment_ends = tensors.segment_ends
        self.data = torch.empty(self.nbytes, dtype=torch.uint8)
        self.data.random_(generator=torch.Generator().manual_seed(seed))
        if frozen is not None:
            same = tensors.segment_ends[LAYERS - TUNED_LAYERS]
            self.data[:same] = frozen.data[:same]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(self.data[offset : offset + len(buffer)])

    def extents(self, offset: int, nbytes: int) -> list[FileExtent] | None:
        return None


@dataclass(frozen=True)
class Switch:
    """Seconds until the first stage and until all stages could run, and the bytes that had to move."""

    first: float
    all: float
    missing: int


class Device:
    """Room for so many pages; models that are switched from one to the other, each keeping what it can."""

    def __init__(
        self,
        backend: _transfer.Backend,
        store: HostStore,
        images: Sequence[StoredImage],
        frames: int,
        chunk_bytes: int,
    ) -> None:
        page_bytes = store.page_bytes
        self.swapper = Swapper(
            backend,
            store,
            device_memory=frames * page_bytes,
            page_bytes=page_bytes,
            chunk_bytes=chunk_bytes,
            verify=False,
        )
        self.registered = {image.id: self.swapper.register(image) for image in images}
        self._poller = select.poll()
        self._poller.register(self.swapper.completions_fd, select.POLLIN)

    def switch(self, leaving: str | None, coming: str) -> Switch:
        image = self.registered[coming].image
        here = self.swapper.resident_pages(coming)
        missing = [page for page in range(len(image.pages)) if page not in here]
        began = time.perf_counter()
        if leaving is not None:
            self._make_room(leaving, coming, missing)
        self.swapper.swap_in(coming, missing, 0)
        gate = self.swapper.gate(coming)
        gate.wait(0)
        first = time.perf_counter()
        gate.wait(len(image.segments) - 1)
        ended = time.perf_counter()
        outcomes = self.swapper.completions()
        while not outcomes:
            self._poller.poll()
            outcomes = self.swapper.completions()
        assert outcomes[0].state == "done", outcomes[0].error
        return Switch(first - began, ended - began, outcomes[0].bytes_moved)

    def _make_room(self, leaving: str, coming: str, missing: Sequence[int]) -> None:
        """Evict the last pages of the leaving model that the coming one does not share, as many as are needed."""
        pages, own = self.registered[coming].image.pages, self.registered[leaving].image.pages
        resident = sorted(self.swapper.resident_pages(leaving), reverse=True)
        there = {own[page] for page in resident}
        short = len({pages[page] for page in missing} - there) - self.swapper.free_frames
        wanted = set(pages)
        private = [page for page in resident if own[page] not in wanted]
        self.swapper.evict(leaving, private[: max(short, 0)])

    def alternate(self, first: str, second: str, switches: int) -> list[Switch]:
        """Switches to and fro after a warm-up; the device is empty before and after."""
        self.switch(None, first)
        measured = []
        here, other = first, second
        for _ in range(WARM_UP + switches):
            measured.append(self.switch(here, other))
            here, other = other, here
        for image_id in (first, second):
            self.swapper.evict(image_id, sorted(self.swapper.resident_pages(image_id)))
        return measured[WARM_UP:]

    def require_equal(self, image_id: str, data: torch.Tensor) -> None:
        """Raises AssertionError unless the device holds exactly these bytes after a switch."""
        self.switch(None, image_id)
        view = torch.utils.dlpack.from_dlpack(self.registered[image_id].parameters.dlpack())[: len(data)]
        assert torch.equal(view.cpu(), data), f"{image_id} differs on the device"
        self.swapper.evict(image_id, sorted(self.swapper.resident_pages(image_id)))


class EmulatedLink:
    """The clock of a link: bytes that are put on it arrive when their time has passed, after those before them."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free_at = 0.0

    def put(self, nbytes: int) -> None:
        self._free_at = max(self._free_at, time.perf_counter()) + nbytes / self._bandwidth

    def wait(self) -> None:
        pause = self._free_at - time.perf_counter() - 100e-6
        if pause > 0:
            time.sleep(pause)
        while time.perf_counter() < self._free_at:
            pass


Weights = list[torch.Tensor]


class WriteBackOnLink:
    """Computron's switch, on the host: a link that both ways share, tensor after tensor."""

    def __init__(self, tensors: Tensors, bandwidth: float) -> None:
        self._device = [torch.empty(nbytes, dtype=torch.uint8) for _, nbytes in tensors.places]
        self._link = EmulatedLink(bandwidth)

    def hold(self, weights: Weights) -> Weights:
        return [tensor.clone() for tensor in weights]

    def switch(self, leaving: Weights, coming: Weights) -> None:
        for host, device in zip(leaving, self._device, strict=True):
            self._copy(host, device)
        for host, device in zip(coming, self._device, strict=True):
            self._copy(device, host)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._link.put(source.nbytes)
        target.copy_(source)
        self._link.wait()


class WriteBackOnTwoLinks:
    """The same with a link each way: a tensor is copied back and its place is loaded at the same time.

    One thread copies both; that is in time as long as two copies are faster than the link is with one.
    """

    def __init__(self, tensors: Tensors, bandwidth: float) -> None:
        self._device = [torch.empty(nbytes, dtype=torch.uint8) for _, nbytes in tensors.places]
        self._out, self._in = EmulatedLink(bandwidth), EmulatedLink(bandwidth)

    def hold(self, weights: Weights) -> Weights:
        return [tensor.clone() for tensor in weights]

    def switch(self, leaving: Weights, coming: Weights) -> None:
        for back, device, load in zip(leaving, self._device, coming, strict=True):
            self._out.put(back.nbytes)
            self._in.put(load.nbytes)  # before any copy: neither link waits for the emulation of the other
            back.copy_(device)
            device.copy_(load)
            self._out.wait()
            self._in.wait()


class WriteBackOnCuda:
    """Computron's switch, on CUDA: both ways at once, on two streams. It is granted room for both models."""

    def __init__(self, tensors: Tensors) -> None:
        self._here, self._other = (
            [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _, nbytes in tensors.places] for _ in range(2)
        )
        self._unload, self._load = torch.cuda.Stream(), torch.cuda.Stream()

    def hold(self, weights: Weights) -> Weights:
        return [tensor.pin_memory() for tensor in weights]

    def switch(self, leaving: Weights, coming: Weights) -> None:
        with torch.cuda.stream(self._unload):
            for host, device in zip(leaving, self._here, strict=True):
                host.copy_(device, non_blocking=True)
        with torch.cuda.stream(self._load):
            for host, device in zip(coming, self._other, strict=True):
                device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        self._here, self._other = self._other, self._here


def write_back_seconds(
    baseline: WriteBackOnLink | WriteBackOnTwoLinks | WriteBackOnCuda,
    tensors: Tensors,
    data: Sequence[torch.Tensor],
    switches: int,
) -> list[float]:
    weights = [baseline.hold([image[offset : offset + nbytes] for offset, nbytes in tensors.places]) for image in data]
    seconds = []
    for number in range(WARM_UP + switches):
        began = time.perf_counter()
        baseline.switch(weights[number % 2], weights[(number + 1) % 2])
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def cuda_bandwidth() -> float:
    """Bytes a second of the link itself: a long copy from pinned memory, the best of five."""
    host = torch.empty(512 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, host.nbytes / (time.perf_counter() - began))
    return best


def add_row(report: Report, name: str, switches: Sequence[Switch], bandwidth: float) -> float:
    """The row of a kind of switch; returns its median seconds."""
    seconds = statistics.median(switch.all for switch in switches)
    bound = statistics.median(switch.missing for switch in switches) / bandwidth
    report.row(name, seconds, "s", bound, seconds / bound)
    return seconds


def measure(report: Report, options: argparse.Namespace) -> None:
    cuda = uses_cuda(options)
    bandwidth = cuda_bandwidth() if cuda else options.bandwidth * 1e9
    backend = _transfer.cuda_backend() if cuda else _transfer.host_backend(link_bandwidth=bandwidth)
    page_bytes, chunk_bytes = (16 * MIB, 4 * MIB) if cuda else (MIB, MIB)
    switches = 4 if options.quick else 16
    torch.set_num_threads(1)  # copies of the baseline: one thread copies faster than the link, and needs no barrier
    tensors = lay_out()
    base = SyntheticImage(tensors, options.seed)
    sources = {
        "a": base,
        "b": SyntheticImage(tensors, options.seed + 1),
        "tuned": SyntheticImage(tensors, options.seed + 2, frozen=base),
    }
    pages = -(-tensors.nbytes // page_bytes)
    store = HostStore(
        backend, budget=3 * pages * page_bytes, page_bytes=page_bytes, load_threads=2, spill_directory=None
    )
    images = [store.add(image_id, source) for image_id, source in sources.items()]
    seconds = {}
    for name, frames, other in (
        ("swap.over_bound", pages, "b"),
        ("swap.partial.over_bound", pages + pages // 2, "b"),
        ("swap.shared.over_bound", pages, "tuned"),
    ):
        device = Device(backend, store, images, frames, chunk_bytes)
        device.require_equal(other, sources[other].data)
        measured = device.alternate("a", other, switches)
        seconds[name] = add_row(report, name, measured, bandwidth)
        if name == "swap.over_bound":
            first = statistics.median(switch.first for switch in measured)
            report.row("swap.first_stage", first, "s", tensors.segment_ends[0] / bandwidth)
        device.swapper.check()
        device.swapper.close()
    store.check()
    store.close()
    baseline = WriteBackOnCuda(tensors) if cuda else WriteBackOnLink(tensors, bandwidth)
    data = [sources[image_id].data for image_id in ("a", "b")]
    one_way = tensors.nbytes / bandwidth
    bars = {}

    def compare(suffix: str, label: str, seconds_each: Sequence[float], bound: float) -> None:
        written_back = bars[label] = statistics.median(seconds_each)
        cold = seconds["swap.over_bound"]
        report.row(f"swap.write_back{suffix}", written_back, "s", bound, written_back / bound)
        report.row(f"swap.vs_write_back{suffix}", cold, "s", written_back, written_back / cold)

    label = "write-back and load" if cuda else "write-back and load, half duplex"
    compare("", label, write_back_seconds(baseline, tensors, data, switches), one_way if cuda else 2 * one_way)
    if not cuda:
        measured_back = write_back_seconds(WriteBackOnTwoLinks(tensors, bandwidth), tensors, data, switches)
        compare("_full_duplex", "write-back and load, full duplex", measured_back, one_way)
    bars |= {name.removesuffix(".over_bound"): value for name, value in seconds.items()}
    report.plot(lambda axes: draw(axes, bars, one_way))


def draw(axes: Axes, seconds: dict[str, float], bound: float) -> None:
    axes.barh(list(seconds), [1e3 * value for value in seconds.values()])
    axes.axvline(1e3 * bound, color="black", linestyle="--", label="one model / bandwidth")
    axes.invert_yaxis()
    axes.set_xlabel("ms a switch")
    axes.legend()


def main() -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--bandwidth", type=float, default=2.0, metavar="GB/s", help="emulated; default: 2")

    options = arguments(__doc__ or "", extend)
    report = Report("Switching models", options, NAMES)
    measure(report, options)
    report.finish()


if __name__ == "__main__":
    main()
