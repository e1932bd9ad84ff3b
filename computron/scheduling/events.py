"""What the scheduler is told. Events are facts; times are seconds on one monotonic clock given to `handle`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the scheduler knows of a model: its pages, not their meaning.

    `pages` holds one content id for each page of the image, in image order, which is the order of first use;
    equal ids, within or across models, are one shared page. `segments` holds the number of pages of each segment.
    `blocks_per_frame` is how many KV cache blocks fit one frame (may be a fraction), 0.0 for models without a cache.
    """

    model: str
    pages: tuple[int, ...]
    segments: tuple[int, ...]
    max_batch_size: int
    max_queue: int = 1024
    pinned: bool = False
    continuous: bool = False  # generate: a request runs for many steps; otherwise one step answers it
    blocks_per_frame: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One unit of work for one model. `cache_blocks`: KV blocks that its first step will hold, 0 without a cache.

    `resumed`: it was taken in before, by a scheduler whose device was lost, and finds its place in the queue however
    full that is.
    """

    id: int
    model: str
    arrival: float
    priority: int = 0  # higher is served first
    deadline: float | None = None  # absolute; not started by then: rejected
    cache_blocks: int = 0
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class RequestArrived:
    request: Request


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The client left. The request's place is free as soon as the step it is in, if any, has ended."""

    request: int


@dataclass(frozen=True, slots=True)
class StageFreed:
    """The first stage of the pipeline is done with the model's last step, which goes on in the later ones.

    If one pass answers the model's requests, its next step may start. Where this is never told, that waits for the end.
    """

    model: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """`finished`: requests answered. `cache_blocks`: for each one that goes on, the blocks its next step will hold.

    A request that is in neither has made no progress, and will hold what it would have held in this step.
    `seconds`: of compute; time in which the step waited for pages does not count.

    Steps of one model end, in whichever way, in the order in which they were ordered: it is the first one under way.
    """

    model: str
    finished: tuple[int, ...]
    seconds: float
    cache_blocks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step raised; all its requests have been answered with an error and are gone."""

    model: str
    failed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepAborted:
    """The step came to nothing because the swap-in that it waited for failed or was cancelled.

    No request advanced; all of them wait again, running ones with the cache that they had before the step.
    """

    model: str


@dataclass(frozen=True, slots=True)
class SwapFinished:
    """`pages`: the image's page indices that are now on the device."""

    model: str
    pages: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class SwapFailed:
    """None of `pages` counts as resident; their frames are free again."""

    model: str
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapCancelled:
    """Answer to `CancelSwap`, once no chunk is in flight; `arrived` are the pages that had come and stay."""

    model: str
    pages: tuple[int, ...]
    arrived: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelAdded:
    spec: ModelSpec


@dataclass(frozen=True, slots=True)
class ModelRemoved:
    """Everything of the model has left the device, and its requests have been answered."""

    model: str


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """An operator wants the model resident; it loses nothing that requests need."""

    model: str


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """An operator wants the model off the device as soon as it is idle."""

    model: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The time asked for by `WakeAt` has come."""


Event = (
    RequestArrived
    | RequestCancelled
    | StageFreed
    | StepFinished
    | StepFailed
    | StepAborted
    | SwapFinished
    | SwapFailed
    | SwapCancelled
    | ModelAdded
    | ModelRemoved
    | LoadAsked
    | UnloadAsked
    | TimePassed
)
