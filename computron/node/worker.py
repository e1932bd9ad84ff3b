"""One device and what is on it: the worker carries out what the scheduler orders, on this node's own memory.

Every method but `load` is called on the event loop's thread and returns at once. Steps run on one compute thread,
transfers on the extension's threads.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.dlpack import from_dlpack

from computron import _transfer
from computron.config import Config, DeviceConfig
from computron.errors import ConfigError
from computron.execution.attention import IMPLEMENTATION
from computron.execution.executor import Executor, make_executor
from computron.execution.requests import StepResult
from computron.memory.host_store import HostStore
from computron.memory.images import StoredImage
from computron.memory.swapper import Gate, SwapOutcome, Swapper
from computron.models.loading import LoadedModel, load_model
from computron.models.plan import ModelPlan
from computron.scheduling.actions import CancelSwap, Evict, Preempt, RaiseUrgency, Run, SetCache, SwapIn

KIB = 1 << 10
MIB = 1 << 20

DEFAULT_PAGE = {"host": 1 * MIB, "cuda": 16 * MIB}
DEFAULT_CHUNK = {"host": 1 * MIB, "cuda": 4 * MIB}
LINK_BANDWIDTH = {"host": 8e9, "cuda": 25e9}  # bytes a second, until the first swaps have been measured
GPU_SHARE = 0.9  # of the free memory of a GPU, where the configuration names no amount: the rest is for activations
HOST_STORE_SHARE = 0.5  # of the machine's memory, likewise


Progress = Callable[[str, int, int], None]
"""Called from loading threads with (model id, bytes loaded, bytes in all)."""


class _LoadProgress:
    def __init__(self, progress: Progress, model: str, total: int) -> None:
        self._progress = progress
        self._model = model
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._model, self._done, self._total)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as this node holds it."""

    plan: ModelPlan
    image: StoredImage
    loaded: LoadedModel
    executor: Executor


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has ended. `waited`: seconds of `seconds` in which it waited for segments."""

    result: StepResult
    started: float
    seconds: float
    waited: float


class MeasuredGate:
    """Passes waits on to the swap's gate and adds up how long they took."""

    __slots__ = ("_gate", "waited", "waiting_since")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.waited = 0.0
        self.waiting_since: float | None = None

    @property
    def is_open(self) -> bool:
        return self._gate.is_open

    def wait(self, segment: int, stream: int = 0) -> None:
        self.waiting_since = time.monotonic()
        try:
            self._gate.wait(segment, stream)
        finally:
            self.waited += time.monotonic() - self.waiting_since
            self.waiting_since = None


def open_backend(config: DeviceConfig) -> _transfer.Backend:
    """The backend that the configuration asks for. Raises ConfigError with the reason if it cannot be had."""
    kind = config.kind
    if kind == "auto":
        kind = "host" if _transfer.cuda_unavailable_reason() is not None else "cuda"
    if kind == "host":
        return _transfer.host_backend(
            link_bandwidth=config.link_bandwidth, link_latency=config.link_latency, copy_threads=config.copy_threads
        )
    reason = _transfer.cuda_unavailable_reason()
    if reason is not None:
        raise ConfigError(f'device.kind is "cuda", but no CUDA device can be used: {reason}', param="device.kind")
    if config.link_bandwidth is not None:
        raise ConfigError("device.link_bandwidth emulates a link on the host backend only", param="device.kind")
    return _transfer.cuda_backend(config.index)


def machine_memory() -> int:
    """Bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Worker:
    def __init__(self, config: Config) -> None:
        device = config.device
        self.backend = open_backend(device)
        kind = self.backend.kind
        self.page_bytes = device.page_size or DEFAULT_PAGE[kind]
        if self.page_bytes % self.backend.granularity:
            raise ConfigError(
                f"device.page_size is {self.page_bytes}, but must be a multiple of {self.backend.granularity} "
                f"on {self.backend.device_name}",
                param="device.page_size",
            )
        memory = device.memory
        if memory is None:
            if kind == "host":
                raise ConfigError('set device.memory, for example "2GiB", on the host backend', param="device.memory")
            memory = int(self.backend.free_memory * GPU_SHARE)
        if memory < self.page_bytes:
            raise ConfigError(
                f"device.memory is {memory} bytes, less than one page of {self.page_bytes}", param="device.memory"
            )
        self.store = HostStore(
            self.backend,
            budget=config.host.memory or int(machine_memory() * HOST_STORE_SHARE),
            page_bytes=self.page_bytes,
            load_threads=config.host.load_threads,
            spill_directory=config.host.spill_directory,
        )
        self.swapper = Swapper(
            self.backend,
            self.store,
            device_memory=memory,
            page_bytes=self.page_bytes,
            chunk_bytes=min(device.chunk_size or DEFAULT_CHUNK[kind], self.page_bytes),
            verify=device.verify,
        )
        self.link_bandwidth_hint = device.link_bandwidth or LINK_BANDWIDTH[kind]
        self.models: dict[str, ServedModel] = {}
        self.gate: MeasuredGate | None = None  # of the step that runs now
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")

    @property
    def frames(self) -> int:
        return self.swapper.frames

    def load(self, plan: ModelPlan, progress: Progress | None) -> ServedModel:
        """Bring a model's image into the host store and build its module around its address range. Blocks.

        Raises ConfigError if the device can never hold the model, CheckpointError if it cannot be read.
        """
        self._check_size(plan)
        model_id = plan.config.id
        report = None if progress is None else _LoadProgress(progress, model_id, plan.image.nbytes)
        image = self.store.add(model_id, plan.image, report)
        cache_bytes = self._cache_range(plan)
        registered = self.swapper.register(image, cache_bytes=cache_bytes)
        parameters = from_dlpack(registered.parameters.dlpack())
        cache = from_dlpack(registered.cache.dlpack()) if registered.cache is not None else None
        attention = IMPLEMENTATION if plan.cache is not None else None
        loaded = load_model(plan, parameters, attention=attention)
        served = ServedModel(plan, image, loaded, make_executor(loaded, cache, self.page_bytes))
        self.models[model_id] = served
        return served

    def _check_size(self, plan: ModelPlan) -> None:
        pages = -(-plan.image.nbytes // self.page_bytes) + (1 if plan.cache is not None else 0)
        if pages > self.frames:
            raise ConfigError(
                f"model {plan.config.id!r} needs {pages * self.page_bytes / MIB:.1f} MiB of device memory"
                f"{' (its parameters and one page of KV cache)' if plan.cache is not None else ''}, but device.memory "
                f"is {self.frames * self.page_bytes / MIB:.1f} MiB: raise device.memory or choose a smaller dtype",
                param="device.memory",
            )

    def _cache_range(self, plan: ModelPlan) -> int:
        if plan.cache is None:
            return 0
        largest = plan.cache.bytes_per_token * plan.max_model_len * plan.config.max_batch_size
        pages = min(-(-largest // self.page_bytes) + 1, self.frames)
        return pages * self.page_bytes

    def perform(self, action: SwapIn | RaiseUrgency | CancelSwap | Evict | SetCache | Preempt) -> None:
        """Carry out one action; the ends of transfers come through `completions`."""
        match action:
            case SwapIn():
                self.swapper.swap_in(action.model, action.pages, int(action.urgency))
            case RaiseUrgency():
                self.swapper.raise_urgency(action.model, int(action.urgency))
            case CancelSwap():
                self.swapper.cancel(action.model)
            case Evict():
                self.swapper.evict(action.model, action.pages)
            case SetCache():
                self._set_cache(action.model, action.frames)
            case Preempt():
                self.models[action.model].executor.preempt(action.request)

    def _set_cache(self, model: str, frames: int) -> None:
        # Frames are mapped before the executor learns of them, and left by the executor before they are unmapped.
        executor = self.models[model].executor
        if frames < self.swapper.cache_frames(model):
            executor.set_cache(frames)
            self.swapper.set_cache(model, frames)
        else:
            self.swapper.set_cache(model, frames)
            executor.set_cache(frames)

    async def run(self, action: Run) -> Step:
        """Run one step on the compute thread. Raises SwapFailed, or whatever the model's code raised."""
        gate = self.gate = MeasuredGate(self.swapper.gate(action.model))
        executor = self.models[action.model].executor
        started = time.monotonic()
        try:
            result = await asyncio.get_running_loop().run_in_executor(
                self._compute, executor.step, action.requests, gate
            )
        finally:
            self.gate = None
        return Step(result, started, time.monotonic() - started, gate.waited)

    @property
    def completions_fd(self) -> int:
        return self.swapper.completions_fd

    def completions(self) -> list[SwapOutcome]:
        return self.swapper.completions()

    def cancel_transfers(self) -> None:
        """End all transfers, so that no step waits any longer."""
        self.swapper.cancel_all()

    def close(self) -> None:
        self._compute.shutdown(wait=True)
        self.models.clear()
        self.swapper.close()
        self.store.close()
