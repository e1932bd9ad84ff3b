"""What is on a device that exists only in numbers, and what is under way there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from computron.scheduling.actions import Evict, SwapIn
from computron.scheduling.events import ModelSpec, Request

PAGE_SECONDS = 0.1
CHUNK_SECONDS = 0.01  # a cancelled transfer ends with the chunk that is in flight


@dataclass
class Transfer:
    pages: tuple[int, ...]
    new_contents: tuple[int, ...]  # in the order of arrival
    urgency: int
    number: int
    ordered: float
    left: float  # seconds of link time
    fails: bool = False
    cancelled: bool = False
    left_at_cancel: float = 0.0

    def cancel(self) -> None:
        assert not self.cancelled
        self.cancelled = True
        self.left_at_cancel = self.left
        self.left = min(self.left, CHUNK_SECONDS)


@dataclass
class RunningStep:
    """stage_seconds: on the first stage, if its end is told. freed: it has been."""

    requests: tuple[int, ...]
    seconds: float
    stage_seconds: float
    opened: tuple[int, ...]
    compute_begins: float | None  # None: it waits for pages
    freed: bool = False

    @property
    def times(self) -> list[float]:
        """When something happens to it."""
        if self.compute_begins is None:
            return []
        stage = (
            [self.compute_begins + self.stage_seconds] if self.stage_seconds < self.seconds and not self.freed else []
        )
        return [*stage, self.compute_begins + self.seconds]


@dataclass
class Live:
    """A request that has arrived and not ended. `steps_left`: steps until it is answered."""

    request: Request
    steps_left: int
    growth: int
    blocks: int
    holds_cache: bool = False
    waiting_since: float = 0.0
    started: float | None = None
    overtaken: int = 0


@dataclass
class Device:
    frames: int
    specs: dict[str, ModelSpec] = field(default_factory=dict)
    mapped: dict[str, set[int]] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)

    def contents(self) -> set[int]:
        """Contents that hold a frame: mapped by someone, or on their way."""
        held = {self.specs[model].pages[page] for model, pages in self.mapped.items() for page in pages}
        for model, transfer in self.transfers.items():
            held |= {self.specs[model].pages[page] for page in transfer.pages}
        return held

    def in_flight(self) -> set[int]:
        return {content for transfer in self.transfers.values() for content in transfer.new_contents}

    @property
    def free(self) -> int:
        return self.frames - len(self.contents()) - sum(self.cache.values())

    def add(self, spec: ModelSpec) -> None:
        self.specs[spec.model] = spec
        self.mapped[spec.model] = set()
        self.cache[spec.model] = 0

    def bring(self, action: SwapIn, number: int, now: float, *, fails: bool) -> None:
        """Begin a transfer, which will have failed at its end if it `fails`."""
        name = action.model
        contents = self.specs[name].pages
        assert name not in self.transfers, "two transfers of one model"
        missing = [page for page in range(len(contents)) if page not in self.mapped[name]]
        assert action.pages
        assert list(action.pages) == missing[: len(action.pages)], "the first pages that lack, in image order"
        coming = [contents[page] for page in action.pages]
        assert not set(coming) & self.in_flight(), "a content is in flight already"
        new = tuple(dict.fromkeys(content for content in coming if content not in self.contents()))
        assert len(new) <= self.free, "frames are over-committed"
        self.transfers[name] = Transfer(action.pages, new, action.urgency, number, now, len(new) * PAGE_SECONDS, fails)

    def keep_what_came(self, name: str, transfer: Transfer) -> tuple[int, ...]:
        """The pages that had arrived when the transfer, which is over, was cancelled."""
        came = len(transfer.new_contents) - math.ceil(transfer.left_at_cancel / PAGE_SECONDS)
        missing = set(transfer.new_contents[came:])
        arrived = tuple(page for page in transfer.pages if self.specs[name].pages[page] not in missing)
        self.mapped[name] |= set(arrived)
        return arrived

    def evict(self, action: Evict) -> None:
        name = action.model
        assert name not in self.transfers, "pages of a model with a transfer under way were evicted"
        if self.specs[name].pinned:
            assert action.reason == "unload", "pages of a pinned model were evicted"
        assert len(set(action.pages)) == len(action.pages)
        assert set(action.pages) <= self.mapped[name], "pages were evicted that are not mapped"
        assert list(action.pages) == sorted(action.pages, reverse=True), "last pages first"
        self.mapped[name] -= set(action.pages)


def spec(
    model: str, pages: int | tuple[int, ...] = 2, *, batch: int = 4, first: int | None = None, **more: object
) -> ModelSpec:
    """A model of so many private pages, or of the given contents."""
    if isinstance(pages, int):
        start = hash_of(model) if first is None else first
        pages = tuple(range(start, start + pages))
    return ModelSpec(model, pages, (len(pages),), batch, **more)


def hash_of(model: str) -> int:
    """A range of contents of the model's own."""
    return 1000 * (1 + int.from_bytes(model.encode(), "big"))
