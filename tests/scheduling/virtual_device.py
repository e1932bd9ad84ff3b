"""What is on a device that exists only in numbers, and what is under way there."""

from __future__ import annotations

from dataclasses import dataclass, field

from computron.scheduling.events import ModelSpec, Request


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
