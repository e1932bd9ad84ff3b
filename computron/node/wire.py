"""The command stream: what the leader orders the other nodes of its group, and what they report.

Orders are carried out in the order in which they were given. Pages are the node's own, frames are the same everywhere.
"""

from __future__ import annotations

import time
from dataclasses import replace

import msgspec

from computron.execution.steps import StepInput, StepOutput
from computron.memory.swap import SwapOutcome

# Orders


class Reset(msgspec.Struct, tag=True, frozen=True):
    """End what is under way, say nothing more to other nodes, and take everything off the device. `Idle` answers."""

    epoch: int


class Form(msgspec.Struct, tag=True, frozen=True):
    """Find the other nodes through the store at this address. `Formed` answers, or `FormFailed`.

    `identities`: for each model, which of its pages are one page of the device (`Swapper.identify`).
    """

    epoch: int
    host: str
    port: int
    identities: dict[str, tuple[int, ...]]


class BringPages(msgspec.Struct, tag=True, frozen=True):
    model: str
    pages: tuple[int, ...]
    urgency: int


class HastenPages(msgspec.Struct, tag=True, frozen=True):
    model: str
    urgency: int


class StopPages(msgspec.Struct, tag=True, frozen=True):
    """Cancel the swap of the model, if one is under way."""

    model: str


class DropPages(msgspec.Struct, tag=True, frozen=True):
    model: str
    pages: tuple[int, ...]


class ResizeCache(msgspec.Struct, tag=True, frozen=True):
    """`moves`: blocks that move (old -> new number) before frames leave."""

    model: str
    frames: int
    moves: dict[int, int]


class RunStep(msgspec.Struct, tag=True, frozen=True):
    """`StepDone` or `StepFailed` answers."""

    number: int
    model: str
    step: StepInput


class Refuse(msgspec.Struct, tag=True, frozen=True):
    """This node does not belong to the group as it is: end."""

    reason: str


class Stop(msgspec.Struct, tag=True, frozen=True):
    """The group is shut down: end, and do not come back."""


Order = Reset | Form | BringPages | HastenPages | StopPages | DropPages | ResizeCache | RunStep | Refuse | Stop

# Reports


class ShardInfo(msgspec.Struct, frozen=True):
    """A model's shard as a node holds it. `pages`: their content ids in this node's host store. `fingerprint`: of the
    model's source, the same on all nodes that have the same.

    `block_bytes`, `cache_blocks`: size of a block of the KV cache, and how many the node can address; 0: no cache.
    """

    model: str
    fingerprint: str
    nbytes: int
    pages: tuple[int, ...]
    block_bytes: int
    cache_blocks: int


class Loading(msgspec.Struct, tag=True, frozen=True):
    """`done` of `total` bytes of the model's shard are in the host store."""

    model: str
    done: int
    total: int


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """All shards are in the host store."""

    frames: int
    page_bytes: int
    link_bandwidth: float
    shards: tuple[ShardInfo, ...]


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    """This node cannot serve what is configured, and ends."""

    reason: str


class Idle(msgspec.Struct, tag=True, frozen=True):
    epoch: int


class Formed(msgspec.Struct, tag=True, frozen=True):
    epoch: int


class FormFailed(msgspec.Struct, tag=True, frozen=True):
    epoch: int
    reason: str


class PagesCame(msgspec.Struct, tag=True, frozen=True):
    """A swap has ended."""

    outcome: SwapOutcome


class StepDone(msgspec.Struct, tag=True, frozen=True):
    """`waited`: seconds in which the step waited for pages. `output`: on the node that has the result."""

    number: int
    waited: float
    output: StepOutput | None


class StepFailed(msgspec.Struct, tag=True, frozen=True):
    """`cause`: swap (pages did not come), group (another node is gone or failed), model (its code raised)."""

    number: int
    cause: str
    reason: str


class NodeFailed(msgspec.Struct, tag=True, frozen=True):
    """The node can do nothing more, ends, and has to be started anew."""

    reason: str


class Figures(msgspec.Struct, tag=True, frozen=True):
    """How the node stands; sent every second or so. Bytes by state, and counts since its start."""

    device_memory: dict[str, int]
    host_memory: dict[str, int]
    transfer_bytes: int
    swaps: dict[str, int]
    link_busy_seconds: float
    pages_shared: int
    host_pages_on_disk: int


Report = (
    Loading
    | Loaded
    | LoadFailed
    | Idle
    | Formed
    | FormFailed
    | PagesCame
    | StepDone
    | StepFailed
    | NodeFailed
    | Figures
)


def as_of_now(outcome: SwapOutcome) -> SwapOutcome:
    """Another host's swap as if it had ended here and now: clocks of different hosts have nothing in common."""
    now = time.monotonic()
    return replace(outcome, started=now - (outcome.finished - outcome.started), finished=now)
