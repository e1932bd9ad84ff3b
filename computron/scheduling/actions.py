"""What the scheduler orders. Actions are imperatives and are carried out in the order in which they are given."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Urgency(enum.IntEnum):
    """Order of transfers on a link; a smaller one overtakes a larger one after the chunk in flight."""

    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2


class EvictionReason(enum.StrEnum):
    DEMAND = "demand"  # frames for a model with waiting requests
    CACHE = "cache"  # frames for a KV cache
    PREFETCH = "prefetch"
    UNLOAD = "unload"


class RejectReason(enum.StrEnum):
    QUEUE_FULL = "queue_full"
    UNKNOWN_MODEL = "unknown_model"
    TOO_LARGE = "too_large"  # model, or model and the request's cache, exceed the device
    DEADLINE = "deadline"
    SWAP_FAILED = "swap_failed"


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Bring these pages (indices into the image) to the device, in this order. Their frames are free when ordered."""

    model: str
    pages: tuple[int, ...]
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class RaiseUrgency:
    """The model's transfer under way shall now be of this urgency."""

    model: str
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class CancelSwap:
    """Stop the model's transfer; `SwapCancelled` (or `SwapFinished`, if it was too late) follows."""

    model: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Unmap these pages of the model; nothing is copied."""

    model: str
    pages: tuple[int, ...]
    reason: EvictionReason


@dataclass(frozen=True, slots=True)
class SetCache:
    """The model's KV cache shall hold exactly this many frames. Given before the `Run` that needs them."""

    model: str
    frames: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """Drop the KV cache of this running request; it waits again and will be computed anew from its tokens."""

    model: str
    request: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run one step of the model: its running requests that are in `requests`, new ones among them.

    The model is resident, or a transfer of all its missing pages is under way and the step waits by segment. Others of
    it may be in later stages of the pipeline, and go first.
    """

    model: str
    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reject:
    request: int
    model: str
    reason: RejectReason


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send `TimePassed` at this time; a later `WakeAt` replaces an earlier one."""

    time: float


Action = SwapIn | RaiseUrgency | CancelSwap | Evict | SetCache | Preempt | Run | Reject | WakeAt
