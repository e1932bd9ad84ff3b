"""The nodes of a group as their leader commands them: its own worker, and the others over the network.

What the scheduler orders is carried out here and sent to the others in the same order; what they report is put together
to what the scheduler knows: one device with the frames of all. A group of one node has nobody to send anything to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from computron.config import Config
from computron.errors import ComputronError, ExecutionFailed, GroupBroken, SwapFailed
from computron.execution.executor import make_executor
from computron.execution.requests import StepResult
from computron.group.codec import encode
from computron.group.environment import LEADER, Place
from computron.memory.swap import SwapOutcome
from computron.node import wire
from computron.node.agreement import Agreement, NodeDiffers, agree
from computron.node.group_runner import GroupRunner
from computron.node.group_swaps import GroupSwaps, Merged
from computron.node.measured_gate import MeasuredGate
from computron.node.peers import Peers
from computron.node.progress import Progress
from computron.node.served_model import ServedModel
from computron.node.sizes import check_sizes
from computron.node.worker import Worker, load_all
from computron.scheduling.actions import CancelSwap, Evict, Preempt, RaiseUrgency, Run, SetCache, SwapIn

log = logging.getLogger(__name__)

LONGEST_PAUSE = 1.0  # seconds between two attempts to form the group


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
        self._runner = None if self.peers is None else GroupRunner(worker, self.peers, config.group, self)
        self.whole = place is None  # every node is there and follows

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
        while not self.whole:
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
            self.whole = True
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

    def break_up(self, reason: str, error: type[GroupBroken] = GroupBroken) -> None:
        """Let nobody wait for anybody; everything under way comes to nothing. `error`: of the steps under way."""
        if not self.whole:
            return
        self.whole = False
        assert self.peers is not None
        log.error("group_broken reason=%s", reason)
        self.worker.abort()
        self.peers.reset()
        self._tear_steps(error(reason))
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
        self.whole = self.whole and self.peers is None
        self.worker.abort()
        self._tear_steps(GroupBroken("the server is shutting down"))

    def _tear_steps(self, error: GroupBroken) -> None:
        if self._runner is not None:
            self._runner.steps.tear(error)

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
            if self._runner is None:
                result = await self.worker.run_alone(served.executor, action.model, action.requests, gate)
                return result, gate.computed_seconds()
            return await self._runner.run(served, action, gate, stage_freed)
        finally:
            self.worker.end_step(action.model, gate)
            late = None if action.model in self.worker.gates else self._late_swaps.pop(action.model, None)
            if late is not None:
                asyncio.get_running_loop().call_soon(self._tell_swap, late)  # the end of the step is told before

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
        if not self.whole:
            return
        merged = self._swaps.end(rank, outcome)
        if merged is None:
            return
        if merged.outcome.state != "done" and outcome.image_id in self.worker.gates:
            self._late_swaps[outcome.image_id] = merged  # a step may be reading what has to go
        else:
            self._tell_swap(merged)

    def _tell_swap(self, merged: Merged) -> None:
        if self.whole:
            self._drop(merged.outcome.image_id, merged.surplus)
            self._listener.swap_ended(merged.outcome)

    def reported(self, rank: int, report: wire.PagesCame | wire.StepDone | wire.StepFailed) -> None:
        """Another node tells how an order ended."""
        assert self._runner is not None, "there are other nodes"
        match report:
            case wire.PagesCame(outcome):
                self._swap_ended(rank, wire.as_of_now(outcome))
            case wire.StepDone(number, waited, output):
                self._runner.steps.succeed(number, rank, output, waited)
            case wire.StepFailed(number, cause, reason):
                self._runner.steps.fail(number, rank, _ERRORS[cause](f"node {rank}: {reason}"))

    def lost(self, rank: int, reason: str) -> None:
        """Another node has gone."""
        self.break_up(f"node {rank} was lost: {reason}")


def _others_first(by_rank: Mapping[int, tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """What is on its way to other nodes takes its time while the leader does its own part."""
    return sorted(by_rank.items(), reverse=True)


_ERRORS: Mapping[str, type[ComputronError]] = {"swap": SwapFailed, "group": GroupBroken, "model": ExecutionFailed}
