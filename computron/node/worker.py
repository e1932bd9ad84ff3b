"""One device and what is on it: the worker carries out, on this node's own memory, what is ordered for all nodes.

Every method but `load` is called on the event loop's thread and returns at once, unless it is awaited. Steps run on one
compute thread, transfers on the extension's threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.dlpack import from_dlpack

from computron import _transfer
from computron.config import Config
from computron.errors import SwapFailed
from computron.execution.attention import IMPLEMENTATION
from computron.execution.blocks import BLOCK_TOKENS, blocks_for
from computron.execution.executor import make_runner, run_step
from computron.execution.protocols import Executor, Runner
from computron.execution.requests import StepResult
from computron.execution.steps import StepInput, StepOutput
from computron.group.communicator import GroupCommunicator
from computron.group.environment import Place
from computron.memory.images import StoredImage
from computron.memory.swapper import SwapOutcome, Swapper
from computron.models.checkpoint import naming
from computron.models.loading import LoadedModel, load_model
from computron.models.plan import ModelPlan, plan_model
from computron.models.shard import WHOLE, Shard
from computron.node import wire
from computron.node.busy import Interval
from computron.node.compute import ComputeThread, Result
from computron.node.device import (
    GPU_SHARE,
    GROUP_GPU_SHARE,
    LINK_BANDWIDTH,
    open_backend,
    open_store,
    open_swapper,
    page_size,
)
from computron.node.measured_gate import MeasuredGate
from computron.node.progress import LoadProgress, Progress
from computron.node.sizes import Need, check_sizes, pinned_beside

SETTLING = 0.002  # seconds between two looks at whether cancelled transfers have ended


@dataclass(frozen=True, slots=True)
class HeldModel:
    """This node's shard of a model. `fingerprint`: of its source; empty where no other node has a part to compare."""

    plan: ModelPlan
    fingerprint: str
    image: StoredImage
    loaded: LoadedModel
    runner: Runner


class Worker:
    """`place`: of this node in its group; None: it serves alone.

    Raises ConfigError if the device, or memory as large as configured, cannot be had.
    """

    def __init__(self, config: Config, place: Place | None = None) -> None:
        group = config.group
        self.shard = (
            WHOLE if place is None else Shard.of_rank(place.rank, group.tensor_parallel, group.pipeline_parallel)
        )
        self.backend = open_backend(config.device, 0 if place is None else place.local_rank)
        self.page_bytes = page_size(config.device, self.backend)
        self.store = open_store(config, self.backend, self.page_bytes, 1 if place is None else place.local_world_size)
        self.swapper: Swapper = open_swapper(
            config.device, self.backend, self.store, self.page_bytes, GPU_SHARE if self.shard.whole else GROUP_GPU_SHARE
        )
        self.link_bandwidth_hint = config.device.link_bandwidth or LINK_BANDWIDTH[self.backend.kind]
        self.models: dict[str, HeldModel] = {}
        self.gates: dict[str, list[MeasuredGate]] = {}  # of each model's steps that have begun and not ended
        self.needs: tuple[Need, ...] = ()
        self._cache_wanted: dict[str, int] = {}  # frames, as last ordered
        self._resetting = asyncio.Lock()
        self._communicator: GroupCommunicator | None = None
        if not self.shard.whole:
            kind = torch.device("cpu" if self.backend.kind == "host" else f"cuda:{self.backend.device_index}")
            self._communicator = GroupCommunicator(self.shard, kind)
        self._compute = ComputeThread(self.backend, self._communicator, chained=self.shard.pipeline_parallel > 1)

    @property
    def frames(self) -> int:
        return self.swapper.frames

    # Loading

    def check_sizes(self, plans: Sequence[ModelPlan]) -> None:
        """Raises ConfigError if the device can never hold one of the models beside the pinned ones."""
        self.needs = tuple(
            Need(plan.config.id, self._pages(plan), plan.cache is not None, plan.config.pinned) for plan in plans
        )
        check_sizes(self.needs, self.frames, self.page_bytes)

    def load(self, plan: ModelPlan, progress: Progress | None) -> HeldModel:
        """Bring a shard's image into the host store and build its module around its address range. Blocks.

        Raises CheckpointError if it cannot be read.
        """
        self._compute.use_device()
        model_id = plan.config.id
        report = None if progress is None else LoadProgress(progress, model_id, plan.image.nbytes)
        image = self.store.add(model_id, plan.image, report)
        registered = self.swapper.register(image, cache_bytes=self._cache_range(plan))
        parameters = from_dlpack(registered.parameters.dlpack())
        cache = from_dlpack(registered.cache.dlpack()) if registered.cache is not None else None
        attention = IMPLEMENTATION if plan.cache is not None else None
        loaded = load_model(plan, parameters, attention=attention, communicator=self._communicator)
        fingerprint = "" if self.shard.whole else plan.fingerprint
        held = HeldModel(plan, fingerprint, image, loaded, make_runner(loaded, cache))
        self.models[model_id] = held
        return held

    async def stop_loading(self) -> None:
        """Let `load` fail soon, in whatever thread it runs: the models will not be served."""
        await self._in_thread(self.store.close)

    def loaded(self) -> wire.Loaded:
        """What this node holds, for those who put the shards together."""
        shards = tuple(
            wire.ShardInfo(
                model=name,
                fingerprint=held.fingerprint,
                nbytes=held.image.nbytes,
                pages=held.image.pages,
                block_bytes=held.runner.block_bytes,
                cache_blocks=held.runner.capacity,
            )
            for name, held in self.models.items()
        )
        return wire.Loaded(self.frames, self.page_bytes, float(self.link_bandwidth_hint), shards)

    def _pages(self, plan: ModelPlan) -> int:
        return -(-plan.image.nbytes // self.page_bytes)

    def _cache_range(self, plan: ModelPlan) -> int:
        """Bytes of addresses for the KV cache: for full batches, but no more than can ever be mapped."""
        if plan.cache is None:
            return 0
        blocks = plan.config.max_batch_size * blocks_for(plan.max_model_len)
        wanted = -(-blocks * BLOCK_TOKENS * plan.cache.bytes_per_token // self.page_bytes)
        room = self.frames - self._pages(plan) - pinned_beside(plan.config.id, self.needs)
        return min(wanted, room) * self.page_bytes

    # The group

    def identify(self, identities: Mapping[str, Sequence[int]]) -> None:
        """Which pages are one page of the device (`Swapper.identify`). Nothing may be on the device."""
        for model, pages in identities.items():
            self.swapper.identify(model, pages)

    async def form(self, epoch: int, host: str, port: int, timeout: float) -> None:
        """Find the other nodes. Raises GroupBroken."""
        communicator = self._communicator
        assert communicator is not None, "there are other nodes"
        await self._in_thread(communicator.form, epoch, host, port, timeout)

    def abort(self) -> None:
        """Let no step wait any longer, for pages or for other nodes."""
        if self._communicator is not None:
            self._communicator.abort()
        self.swapper.cancel_all()

    async def reset(self) -> None:
        """End what is under way and take everything off the device. How swaps ended is told to nobody."""
        self.abort()
        async with self._resetting:  # one after the other: an earlier one shall not undo what follows a later one
            await self.compute(lambda: None)  # what was given to the compute thread before has ended
            while self.gates or self.swapper.swapping:
                self.swapper.completions()
                await asyncio.sleep(SETTLING)
            for model in list(self.models):
                self.swapper.evict(model, sorted(self.swapper.resident_pages(model)))
                self._cache_wanted[model] = 0
                if self.swapper.cache_frames(model):
                    self.swapper.set_cache(model, 0)

    # Orders

    def swap_in(self, model: str, pages: Sequence[int], urgency: int) -> None:
        """The end comes out of `completions`."""
        self.swapper.swap_in(model, pages, urgency)

    def hasten(self, model: str, urgency: int) -> None:
        self.swapper.raise_urgency(model, urgency)

    def cancel(self, model: str) -> None:
        self.swapper.cancel(model)

    def evict(self, model: str, pages: Sequence[int]) -> None:
        self.swapper.evict(model, pages)

    def cache_wanted(self, model: str) -> int:
        """Frames of its cache, as last ordered."""
        return self._cache_wanted.get(model, 0)

    def set_cache(self, model: str, frames: int, moves: Mapping[int, int]) -> None:
        """Less is done at once, after its blocks have moved. More is mapped by the step that needs it, which can fail
        where this cannot.
        """
        self._cache_wanted[model] = frames
        if moves:  # also where this node's frames stay: all nodes number blocks alike
            self.models[model].runner.move_cache(moves)
        frames = self._cache_frames(model)
        if frames < self.swapper.cache_frames(model):
            self.swapper.set_cache(model, frames)

    def _cache_frames(self, model: str) -> int:
        """Of those wanted, as many as this node has a use for: its blocks may be smaller than those of others."""
        return min(self.cache_wanted(model), self.swapper.cache_limit(model))

    def begin_step(self, model: str) -> MeasuredGate:
        """Map the cache that the step needs, and hold the model's pages until `end_step`.

        Raises SwapFailed if the cache cannot be mapped, or pages are neither here nor on their way.
        """
        missing = self.swapper.missing_pages(model)
        if missing:
            raise SwapFailed(f"{missing} pages of {model} are not on the device")
        wanted = self._cache_frames(model)
        if wanted > self.swapper.cache_frames(model):
            self.swapper.set_cache(model, wanted)
        gate = MeasuredGate(self.swapper.begin_step(model))
        self.gates.setdefault(model, []).append(gate)
        return gate

    async def run(self, model: str, step: StepInput, gate: MeasuredGate) -> StepOutput | None:
        """This node's part of a step, on the compute thread; the result where it is.

        Raises SwapFailed, GroupBroken, or ExecutionFailed if the model's code raised.
        """
        held = self.models[model]
        return await self._compute.run(self._compute.step, held.loaded, gate, lambda: held.runner.run(step, gate))

    async def plan(
        self, model: str, executor: Executor, requests: Sequence[int], gate: MeasuredGate
    ) -> StepInput | None:
        """Plan a step on the compute thread. Raises what the executor does."""
        held = self.models[model]

        def plan() -> StepInput | None:
            held.loaded.gate = gate
            return executor.plan(requests)

        return await self._compute.run(plan)

    async def run_alone(
        self, executor: Executor, model: str, requests: Sequence[int], gate: MeasuredGate
    ) -> StepResult:
        """A whole step of a model that is whole here. Raises as `run`, and OutOfMemory."""
        held = self.models[model]
        return await self._compute.run(
            self._compute.step, held.loaded, gate, lambda: run_step(executor, held.runner, requests, gate)
        )

    async def leave_stages(self, error: BaseException) -> None:
        """A step cannot begin here: once those ahead of it have run, have no part in any."""
        await self._compute.run(self._compute.leave_stages, error)

    def end_step(self, model: str, gate: MeasuredGate) -> None:
        """The step that began with this gate reads nothing any more."""
        self.gates[model].remove(gate)
        if not self.gates[model]:
            del self.gates[model]
        self.swapper.end_step(model)

    def computing(self) -> list[Interval]:
        """When the steps that have not ended have computed so far."""
        now = time.monotonic()
        return [interval for gates in self.gates.values() for gate in gates for interval in gate.computing(now)]

    async def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call this on the compute thread, after the steps given to it before."""
        return await self._compute.run(function, *arguments)

    async def beside_compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call this on a thread of no steps."""
        return await self._in_thread(function, *arguments)

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)

    # Transfers

    @property
    def completions_fd(self) -> int:
        return self.swapper.completions_fd

    def completions(self) -> list[SwapOutcome]:
        return self.swapper.completions()

    def device_error(self) -> str | None:
        """Words of an error after which the device can do nothing more; asks the device."""
        if self.backend.failed is None and self.backend.kind == "cuda":
            try:
                _ = self.backend.free_memory
            except _transfer.TransferError as error:
                return str(error)
        return self.backend.failed

    def figures(self) -> wire.Figures:
        """How this node stands."""
        host, device, page = self.store.statistics(), self.swapper.statistics(), self.page_bytes
        return wire.Figures(
            device_memory={
                "parameters": device.parameter_frames * page,
                "cache": device.cache_frames * page,
                "free": device.free_frames * page,
            },
            host_memory={"used": host.used, "free": host.budget - host.used},
            transfer_bytes=device.bytes_moved,
            swaps={"done": device.swaps_done, "failed": device.swaps_failed, "cancelled": device.swaps_cancelled},
            link_busy_seconds=device.link_seconds,
            pages_shared=host.shared_pages,
            host_pages_on_disk=host.on_disk_pages,
        )

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
        self._compute.close()
        self.models.clear()
        self.swapper.close()
        self.store.close()


async def open_worker(config: Config, place: Place | None) -> Worker:
    """In a thread, since taking much memory takes long, and whoever watches this process wants signs of life."""
    return await asyncio.get_running_loop().run_in_executor(None, Worker, config, place)


async def load_all(worker: Worker, config: Config, progress: Progress | None) -> None:
    """Plan and load this node's shards of all models. Raises ConfigError or CheckpointError, naming the model."""
    loop = asyncio.get_running_loop()
    plans = [await loop.run_in_executor(None, plan_model, model, worker.shard) for model in config.models]
    worker.check_sizes(plans)
    for plan in plans:
        with naming(plan.config.id):
            await loop.run_in_executor(None, worker.load, plan, progress)
