"""The nodes of a group as their leader commands them: its own worker, and the others over the network.

What the scheduler orders is carried out here and sent to the others in the same order; what they report is put together
to what the scheduler knows: one device with the frames of all. A group of one node has nobody to send anything to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from computron.config import Config, SchedulerConfig
from computron.errors import ComputronError, ExecutionFailed, GroupBroken, SwapFailed
from computron.execution.executor import make_executor
from computron.execution.protocols import Executor
from computron.execution.requests import StepResult
from computron.execution.steps import StepInput
from computron.group.codec import encode
from computron.group.environment import LEADER, Place
from computron.memory.swap import SwapOutcome
from computron.models.loading import LoadedModel
from computron.models.plan import ModelPlan
from computron.node import wire
from computron.node.agreement import Agreement, GroupModel, NodeDiffers, agree
from computron.node.group_steps import GroupStep
from computron.node.group_swaps import GroupSwaps, Merged
from computron.node.measured_gate import MeasuredGate
from computron.node.peers import Peers
from computron.node.progress import Progress
from computron.node.sizes import check_sizes
from computron.node.worker import Worker, load_all
from computron.scheduling.actions import CancelSwap, Evict, Preempt, RaiseUrgency, Run, SetCache, SwapIn
from computron.scheduling.events import ModelSpec

log = logging.getLogger(__name__)

LONGEST_PAUSE = 1.0  # seconds between two attempts to form the group


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as requests see it. `loaded`: the leader's shard of it; `held`: what the group holds."""

    plan: ModelPlan
    loaded: LoadedModel
    executor: Executor
    held: GroupModel


def model_spec(served: ServedModel, scheduler: SchedulerConfig) -> ModelSpec:
    """The model as the scheduler knows it."""
    config = served.plan.config
    return ModelSpec(
        model=config.id,
        pages=served.held.pages,
        segments=(len(served.held.pages),),
        max_batch_size=config.max_batch_size,
        max_queue=scheduler.max_queue if config.max_queue is None else config.max_queue,
        pinned=config.pinned,
        continuous=config.task == "generate",
        blocks_per_frame=served.executor.blocks_per_frame,
    )


class Listener(Protocol):
    """Who commands. Called on the event loop's thread."""

    def swap_ended(self, outcome: SwapOutcome) -> None: ...

    def broken(self, reason: str) -> None:
        """Nothing can be run until `Crew.recover` has ended. Told once each time."""

    def failed(self, reason: str) -> None:
        """The leader's own device can do nothing more."""


class Crew:
    """All methods belong to the event loop's thread. `worker`: this node's; `place`: its own, the leader's; None: there
    are no other nodes.
    """

    def __init__(self, config: Config, worker: Worker, place: Place | None, listener: Listener) -> None:
        self._config = config
        self._listener = listener
        self.worker = worker
        self.peers = None if place is None else Peers(config, place, self)
        self.models: dict[str, ServedModel] = {}
        self._agreement: Agreement | None = None
        self._swaps = GroupSwaps({})
        self._late_swaps: dict[str, Merged] = {}  # not all done, and ended during a step of their model
        self._steps: dict[int, GroupStep] = {}
        self._next_step = 0
        self._whole = place is None  # every node is there and follows

    # Start and recovery

    async def start(self, progress: Progress | None) -> None:
        """Load this node's shards, wait for the other nodes to have loaded theirs, and become one group.

        Raises ConfigError or CheckpointError if a model cannot be served by one of them.
        """
        loop = asyncio.get_running_loop()
        if self.peers is not None:
            await self.peers.open(progress)
            progress = self.peers.own_progress
        loading = asyncio.ensure_future(load_all(self.worker, self._config, progress))
        if self.peers is None:
            await loading
            self._agree([self.worker.loaded()])
        else:
            await self._all_loaded(loading, asyncio.ensure_future(self.peers.first_loaded()))
            await self.recover()
        loop.add_reader(self.worker.completions_fd, self._on_transfers)

    async def _all_loaded(self, own: asyncio.Future[None], others: asyncio.Future[None]) -> None:
        """Wait for both; if one fails, the other is for nothing. Raises what it raised."""
        try:
            await asyncio.wait((own, others), return_when=asyncio.FIRST_EXCEPTION)
            if others.done() and others.exception() is not None and not own.done():
                await self.worker.stop_loading()
                await asyncio.wait([own])
                own.exception()
                await others
            await own
            await others
        finally:
            others.cancel()

    async def recover(self) -> None:
        """Wait until all nodes are there, take everything off all devices, and let them find each other anew."""
        peers = self.peers
        assert peers is not None
        pause = 0.0
        while not self._whole:
            try:
                await peers.gather(self.worker)
                agreement = self._agree([self.worker.loaded(), *peers.loaded()])
                self.worker.identify(agreement.identities(LEADER))
                await peers.form(self.worker, agreement)
            except NodeDiffers as error:
                if self._agreement is None:  # the first start: whoever made it wants to know
                    raise
                peers.refuse(error.rank, error.message)
                continue
            except GroupBroken as error:
                log.warning("group_not_formed reason=%s", error.message)
                peers.why_not_formed = error.message
                await asyncio.sleep(pause)
                pause = min(2 * pause + 0.1, LONGEST_PAUSE)
                continue
            self._whole = True
            peers.why_not_formed = None
            log.info("group_formed nodes=%d epoch=%d", self._config.group.nodes, peers.epoch)

    def _agree(self, nodes: Sequence[wire.Loaded]) -> Agreement:
        agreement = self._agreement = agree(nodes)
        counts = {name: model.page_counts for name, model in agreement.models.items()}
        needs = [replace(need, pages=max(counts[need.model])) for need in self.worker.needs]
        check_sizes(needs, agreement.frames, agreement.page_bytes)
        self._swaps = GroupSwaps(counts)
        for name, held in agreement.models.items():
            local = self.worker.models[name]
            served = self.models.get(name)
            executor = (
                make_executor(local.loaded, agreement.page_bytes, held.block_bytes, held.cache_blocks)
                if served is None
                else served.executor
            )
            self.models[name] = ServedModel(local.plan, local.loaded, executor, held)
        return agreement

    @property
    def agreement(self) -> Agreement:
        assert self._agreement is not None, "the group has been formed"
        return self._agreement

    def break_up(self, reason: str) -> None:
        """Let nobody wait for anybody; everything under way comes to nothing."""
        if not self._whole:
            return
        self._whole = False
        assert self.peers is not None
        log.error("group_broken reason=%s", reason)
        self.worker.abort()
        self.peers.reset()
        for step in list(self._steps.values()):
            step.tear(reason)
        self._swaps.forget()
        self._late_swaps.clear()
        self._listener.broken(reason)

    async def close(self) -> None:
        """Stop all nodes. Steps must have ended."""
        if self.peers is not None:
            await self.peers.close()
        await asyncio.get_running_loop().run_in_executor(None, self.worker.close)

    async def leave(self) -> None:
        """Let the other nodes know that this process ends at once."""
        if self.peers is not None:
            await self.peers.close()

    def cancel_transfers(self) -> None:
        """Free whoever waits for pages or for another node, and hear of no further swap."""
        asyncio.get_running_loop().remove_reader(self.worker.completions_fd)
        self._whole = self._whole and self.peers is None
        self.worker.abort()
        for step in list(self._steps.values()):
            step.tear("the server is shutting down")

    # Orders

    def perform(self, action: SwapIn | RaiseUrgency | CancelSwap | Evict | SetCache | Preempt) -> None:
        """Carry out one action on all nodes; the ends of swaps come to the listener."""
        worker, model = self.worker, action.model
        match action:
            case SwapIn():
                urgency = int(action.urgency)
                ordered = self._swaps.begin(model, action.pages)
                for rank, pages in _others_first(ordered):
                    if rank != LEADER:
                        self._send(rank, wire.BringPages(model, pages, urgency))
                    else:
                        worker.swap_in(model, pages, urgency)
            case RaiseUrgency():
                self._broadcast(wire.HastenPages(model, int(action.urgency)))
                worker.hasten(model, int(action.urgency))
            case CancelSwap():
                self._broadcast(wire.StopPages(model))
                worker.cancel(model)
            case Evict():
                self._drop(model, self._swaps.pages_of(model, action.pages))
            case SetCache():
                executor = self.models[model].executor
                moves = executor.set_cache(action.frames) if action.frames < worker.cache_wanted(model) else {}
                self._broadcast(wire.ResizeCache(model, action.frames, dict(moves)))
                worker.set_cache(model, action.frames, moves)
            case Preempt():
                self.models[model].executor.preempt(action.request)

    def _drop(self, model: str, pages: Mapping[int, tuple[int, ...]]) -> None:
        for rank, own in _others_first(pages):
            if rank != LEADER:
                self._send(rank, wire.DropPages(model, own))
            else:
                self.worker.evict(model, own)

    def _send(self, rank: int, order: wire.Order) -> None:
        if self.peers is not None:
            self.peers.send(rank, encode(order))

    def _broadcast(self, order: wire.Order) -> None:
        if self.peers is not None:
            self.peers.broadcast(encode(order))

    # Steps

    def begin_step(self, model: str) -> MeasuredGate:
        """Hold the model's pages on this node until `run` has ended. Raises SwapFailed."""
        gate = self.worker.begin_step(model)
        self.models[model].executor.set_cache(self.worker.cache_wanted(model))
        return gate

    async def run(self, action: Run, gate: MeasuredGate, stage_freed: Callable[[], None]) -> tuple[StepResult, float]:
        """Run one step on all nodes; gives its result, and the seconds that it took beside waiting for pages.

        `stage_freed` is called when the first stage of several is done with it and the others are not.
        Raises SwapFailed, GroupBroken, or whatever the model's code raised; no request has advanced then.
        """
        served = self.models[action.model]
        try:
            if self.peers is None:
                result = await self.worker.run_alone(served.executor, action.model, action.requests, gate)
                return result, gate.computed_seconds()
            return await self._run_together(self.peers, served, action, gate, stage_freed)
        finally:
            self.worker.end_step(action.model, gate)
            late = None if action.model in self.worker.gates else self._late_swaps.pop(action.model, None)
            if late is not None:
                asyncio.get_running_loop().call_soon(self._tell_swap, late)  # the end of the step is told before

    async def _run_together(
        self, peers: Peers, served: ServedModel, action: Run, gate: MeasuredGate, stage_freed: Callable[[], None]
    ) -> tuple[StepResult, float]:
        executor, worker = served.executor, self.worker
        if served.plan.task == "custom":  # its batch manager's code may take its time, and use the module
            step = await worker.plan(action.model, executor, action.requests, gate)
        else:
            step = executor.plan(action.requests)
        if step is None:
            return executor.empty_result(), 0.0
        number = self._next_step
        self._next_step += 1
        group = self._config.group
        together = self._steps[number] = GroupStep(range(group.nodes), chained=group.pipeline_parallel > 1)
        try:
            if not self._whole:
                raise GroupBroken("the group is being formed anew")
            began = time.monotonic()
            peers.broadcast(encode(wire.RunStep(number, action.model, step)))
            own = asyncio.ensure_future(self._run_own(together, action.model, step, gate, stage_freed))
            try:
                await together.done
            finally:
                if together.torn:  # this node may wait for the one that failed
                    self.break_up(f"a step of {action.model} did not end on all nodes")
                await own
            assert together.output is not None, "a node of the last stage reports a result"
            seconds = max(0.0, time.monotonic() - began - together.waited)
            if executor.overlaps:  # it uses nothing that later steps do, and need not wait for them
                return await worker.beside_compute(executor.finish, step, together.output), seconds
            return await worker.compute(executor.finish, step, together.output), seconds
        except BaseException:
            executor.abandon(step)
            raise
        finally:
            del self._steps[number]

    async def _run_own(
        self, together: GroupStep, model: str, step: StepInput, gate: MeasuredGate, freed: Callable[[], None]
    ) -> None:
        try:
            output = await self.worker.run(model, step, gate)
        except ComputronError as error:
            together.fail(LEADER, error)
        except BaseException as error:
            together.fail(LEADER, ExecutionFailed(f"{type(error).__name__}: {error}"))
            raise
        else:
            together.succeed(LEADER, output, gate.waited_seconds())
            if self._config.group.pipeline_parallel > 1 and not together.done.done():  # the leader is in the first
                freed()

    def device_error(self) -> str | None:
        return self.worker.device_error()

    def figures(self) -> dict[int, wire.Figures]:
        """How each node that is there stands."""
        others = {} if self.peers is None else self.peers.figures()
        return {LEADER: self.worker.figures(), **others}

    # Reports

    def _on_transfers(self) -> None:
        try:
            for outcome in self.worker.completions():
                self._swap_ended(LEADER, outcome)
        except Exception as error:
            self._listener.failed(f"{type(error).__name__}: {error}")
            raise
        reason = self.worker.backend.failed
        if reason is not None:
            self._listener.failed(reason)

    def _swap_ended(self, rank: int, outcome: SwapOutcome) -> None:
        if not self._whole:
            return
        merged = self._swaps.end(rank, outcome)
        if merged is None:
            return
        if merged.outcome.state != "done" and outcome.image_id in self.worker.gates:
            self._late_swaps[outcome.image_id] = merged  # a step may be reading what has to go
        else:
            self._tell_swap(merged)

    def _tell_swap(self, merged: Merged) -> None:
        if self._whole:
            self._drop(merged.outcome.image_id, merged.surplus)
            self._listener.swap_ended(merged.outcome)

    def reported(self, rank: int, report: wire.PagesCame | wire.StepDone | wire.StepFailed) -> None:
        """Another node tells how an order ended."""
        match report:
            case wire.PagesCame(outcome):
                self._swap_ended(rank, wire.as_of_now(outcome))
            case wire.StepDone(number, waited, output):
                if (step := self._steps.get(number)) is not None:
                    step.succeed(rank, output, waited)
            case wire.StepFailed(number, cause, reason):
                if (step := self._steps.get(number)) is not None:
                    step.fail(rank, _ERRORS[cause](f"node {rank}: {reason}"))

    def lost(self, rank: int, reason: str) -> None:
        """Another node has gone."""
        self.break_up(f"node {rank} was lost: {reason}")


def _others_first(by_rank: Mapping[int, tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """What is on its way to other nodes takes its time while the leader does its own part."""
    return sorted(by_rank.items(), reverse=True)


_ERRORS: Mapping[str, type[ComputronError]] = {"swap": SwapFailed, "group": GroupBroken, "model": ExecutionFailed}
