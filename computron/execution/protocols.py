"""The two halves of running a model: the executor knows requests, the runner knows the module and its memory.

A step is planned by the executor, run by the runner of every node of the group, and finished by the executor with what
the node that holds the end of the model gave. On one node all three follow each other on the compute thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from computron.execution.requests import Job, StepResult
from computron.execution.steps import StepInput, StepOutput
from computron.models import Gate


class Executor(Protocol):
    """The leader's half. One step of a model at a time, `plan`, then `finish` or `abandon`, unless it `overlaps`.

    `prepare` and `add` may be called at any time, from another thread too; the rest between steps, but for `drop` of
    requests that are in none.
    """

    @property
    def blocks_per_frame(self) -> float:
        """KV cache blocks in a frame, may be a fraction; 0.0 without a cache."""

    @property
    def max_len(self) -> int:
        """Tokens of one sequence at most, prompt and answer together; 0 for models that do not generate."""

    @property
    def overlaps(self) -> bool:
        """May a step be planned, and another one finished on any thread, while others are on their way?"""

    def limit_cache(self, block_bytes: int, capacity: int) -> None:
        """For a group, before anything else: the bytes of a block on the node where it is largest, and the blocks that
        every node can address.
        """

    def prepare(self, job: Job) -> int:
        """Check the job against the model; gives the KV blocks that its first step will hold, 0 without a cache.

        Raises BadRequest if it cannot be served as it is, ContextTooLong if it is longer than the model takes.
        """

    def add(self, request: int, job: Job) -> None:
        """Make the request known; it runs when `plan` names it."""

    def drop(self, request: int) -> None:
        """Forget the request and free what it holds. Nothing happens if it is not known."""

    def preempt(self, request: int) -> int:
        """Free the request's cache and keep its tokens; gives the KV blocks that its next first step will hold."""

    def set_cache(self, frames: int) -> Mapping[int, int]:
        """The cache has this many frames from now on.

        Gives the blocks, old -> new number, that every runner has to move before frames are unmapped.
        """

    def plan(self, requests: Sequence[int]) -> StepInput | None:
        """What the runners have to do for one step of these requests; None if there is nothing to do.

        Raises OutOfMemory if the cache has no room for any of them, ExecutionFailed if the model's own code raises.
        Then, and where it gives None, there is nothing to finish or abandon.
        """

    def finish(self, step: StepInput, output: StepOutput) -> StepResult:
        """The step has run: choose tokens and move its requests on.

        On one node it belongs to the compute thread and to the time in which the model's pages are held.
        Raises ExecutionFailed; then no request has advanced, and the step has to be abandoned.
        """

    def abandon(self, step: StepInput) -> None:
        """The step came to nothing: what was taken for it goes back. Nothing happens if it has been finished."""

    def empty_result(self) -> StepResult:
        """The result where `plan` gave None."""


class Runner(Protocol):
    """Each node's half."""

    @property
    def block_bytes(self) -> int:
        """Of this node's part of the KV cache; 0 without a cache."""

    @property
    def capacity(self) -> int:
        """Blocks that this node can address; 0 without a cache."""

    def run(self, step: StepInput, gate: Gate) -> StepOutput | None:
        """The forward passes of one step, which wait at `gate` for the segments that they need.

        None where the result is not (`plan.shard.gives_result`). Belongs to the compute thread.
        Raises SwapFailed if the gate does (the step may be tried again), GroupBroken if the group breaks, and
        ExecutionFailed if the model's code raises.
        """

    def move_cache(self, moves: Mapping[int, int]) -> None:
        """Move blocks, old -> new number. Between steps; done when this returns."""
