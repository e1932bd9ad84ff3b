"""One device and what is on it: the worker carries out what the scheduler orders, on this node's own memory.

Every method but `load` is called on the event loop's thread and returns at once. Steps run on one compute thread,
transfers on the extension's threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.dlpack import from_dlpack

from computron import _transfer
from computron.config import Config
from computron.errors import ConfigError
from computron.execution.attention import IMPLEMENTATION
from computron.execution.blocks import BLOCK_TOKENS, blocks_for
from computron.execution.executor import make_executor, make_runner, run_step
from computron.execution.protocols import Executor, Runner
from computron.execution.requests import StepResult
from computron.memory.images import StoredImage
from computron.memory.swapper import SwapOutcome, Swapper
from computron.models.loading import LoadedModel, load_model
from computron.models.plan import ModelPlan
from computron.node.device import LINK_BANDWIDTH, MIB, open_backend, open_store, open_swapper, page_size
from computron.node.measured_gate import MeasuredGate
from computron.scheduling.actions import CancelSwap, Evict, Preempt, RaiseUrgency, Run, SetCache, SwapIn

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
    runner: Runner


class Worker:
    """Raises ConfigError if the device, or memory as large as configured, cannot be had."""

    def __init__(self, config: Config) -> None:
        self.backend = open_backend(config.device)
        self.page_bytes = page_size(config.device, self.backend)
        self.store = open_store(config, self.backend, self.page_bytes)
        self.swapper: Swapper = open_swapper(config.device, self.backend, self.store, self.page_bytes)
        self.link_bandwidth_hint = config.device.link_bandwidth or LINK_BANDWIDTH[self.backend.kind]
        self.models: dict[str, ServedModel] = {}
        self.gate: MeasuredGate | None = None  # of the step that runs now
        self._pinned_pages: dict[str, int] = {}
        self._cache_wanted: dict[str, int] = {}  # frames, as last ordered
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")

    @property
    def frames(self) -> int:
        return self.swapper.frames

    # Loading

    def check_sizes(self, plans: Sequence[ModelPlan]) -> None:
        """Raises ConfigError if the device can never hold one of the models beside the pinned ones."""
        self._pinned_pages = {plan.config.id: self._pages(plan) for plan in plans if plan.config.pinned}
        for plan in plans:
            needed = self._pages(plan) + (1 if plan.cache is not None else 0)
            pinned = self._pinned_beside(plan)
            if needed + pinned > self.frames:
                beside = f" beside {self._mib(pinned)} of pinned models" if pinned else ""
                cache = " (its parameters and one page of KV cache)" if plan.cache is not None else ""
                raise ConfigError(
                    f"model {plan.config.id!r} needs {self._mib(needed)} of device memory{cache}{beside}, but "
                    f"device.memory is {self._mib(self.frames)}: raise device.memory"
                    f"{', pin fewer models' if pinned else ''} or choose a smaller dtype",
                    param="device.memory",
                )

    def load(self, plan: ModelPlan, progress: Progress | None) -> ServedModel:
        """Bring a model's image into the host store and build its module around its address range. Blocks.

        Raises CheckpointError if it cannot be read.
        """
        model_id = plan.config.id
        report = None if progress is None else _LoadProgress(progress, model_id, plan.image.nbytes)
        image = self.store.add(model_id, plan.image, report)
        registered = self.swapper.register(image, cache_bytes=self._cache_range(plan))
        parameters = from_dlpack(registered.parameters.dlpack())
        cache = from_dlpack(registered.cache.dlpack()) if registered.cache is not None else None
        attention = IMPLEMENTATION if plan.cache is not None else None
        loaded = load_model(plan, parameters, attention=attention)
        runner = make_runner(loaded, cache)
        executor = make_executor(loaded, self.page_bytes, runner.block_bytes, runner.capacity)
        served = ServedModel(plan, image, loaded, executor, runner)
        self.models[model_id] = served
        return served

    def _pages(self, plan: ModelPlan) -> int:
        return -(-plan.image.nbytes // self.page_bytes)

    def _pinned_beside(self, plan: ModelPlan) -> int:
        return sum(pages for model, pages in self._pinned_pages.items() if model != plan.config.id)

    def _mib(self, pages: int) -> str:
        return f"{pages * self.page_bytes / MIB:.1f} MiB"

    def _cache_range(self, plan: ModelPlan) -> int:
        """Bytes of addresses for the KV cache: for full batches, but no more than can ever be mapped."""
        if plan.cache is None:
            return 0
        blocks = plan.config.max_batch_size * blocks_for(plan.max_model_len)
        wanted = -(-blocks * BLOCK_TOKENS * plan.cache.bytes_per_token // self.page_bytes)
        room = self.frames - self._pages(plan) - self._pinned_beside(plan)
        return min(wanted, room) * self.page_bytes

    # Orders

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
        """Less is done at once. More is mapped by the step that needs it, which can fail where this cannot."""
        self._cache_wanted[model] = frames
        if frames < self.swapper.cache_frames(model):
            served = self.models[model]
            served.runner.move_cache(served.executor.set_cache(frames))  # blocks leave before frames are unmapped
            self.swapper.set_cache(model, frames)

    def begin_step(self, model: str) -> MeasuredGate:
        """Map the cache that the step needs, and hold the model's pages until `end_step`.

        Raises SwapFailed if the cache cannot be mapped.
        """
        wanted = self._cache_wanted.get(model, 0)
        if wanted > self.swapper.cache_frames(model):
            self.swapper.set_cache(model, wanted)
            self.models[model].executor.set_cache(wanted)
        self.gate = MeasuredGate(self.swapper.begin_step(model))
        return self.gate

    async def run(self, action: Run, gate: MeasuredGate) -> StepResult:
        """Run one step on the compute thread. Raises SwapFailed, or whatever the model's code raised."""
        served = self.models[action.model]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compute, self._run, served, action.requests, gate)

    def _run(self, served: ServedModel, requests: Sequence[int], gate: MeasuredGate) -> StepResult:
        gate.begin()
        try:
            served.loaded.gate = gate  # a custom model's batch manager may use the module before the forward
            return run_step(served.executor, served.runner, requests, gate)
        finally:
            if self.backend.kind == "cuda":
                # Nothing may read pages or cache after the step, also if it raised half way or gave no token.
                torch.cuda.current_stream(self.backend.device_index).synchronize()
            gate.end()

    def end_step(self, model: str) -> None:
        """The step reads nothing any more."""
        self.gate = None
        self.swapper.end_step(model)

    # Transfers

    @property
    def completions_fd(self) -> int:
        return self.swapper.completions_fd

    def completions(self) -> list[SwapOutcome]:
        return self.swapper.completions()

    def cancel_transfers(self) -> None:
        """End all transfers, so that no step waits any longer."""
        self.swapper.cancel_all()

    def device_error(self) -> str | None:
        """Words of an error after which the device can do nothing more; asks the device."""
        if self.backend.failed is None and self.backend.kind == "cuda":
            try:
                _ = self.backend.free_memory
            except _transfer.TransferError as error:
                return str(error)
        return self.backend.failed

    def close(self) -> None:
        self._compute.shutdown(wait=True)
        self.models.clear()
        self.swapper.close()
        self.store.close()
