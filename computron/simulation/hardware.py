"""What a group of devices can do, in numbers. Times are seconds, sizes bytes, and all of it is one node's share.

The nodes of a group do the same at the same time (docs/parallelism.md), so that one device stands for all of them: its
frames are one node's, its link is one node's, and a model's bytes are those that one node holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import msgspec


@dataclass(frozen=True, slots=True)
class Link:
    """From the host's memory to the device. A transfer takes `latency` + bytes / `bandwidth` if it is alone.

    duplex: the share of the bandwidth that each direction keeps while both are busy; matters to systems that write
    weights back.
    """

    bandwidth: float
    latency: float = 0.0
    duplex: float = 1.0

    def __post_init__(self) -> None:
        _require(0.0 < self.bandwidth < math.inf, "a link's bandwidth must be more than 0", self.bandwidth)
        _require(0.0 <= self.latency < math.inf, "a link's latency must be at least 0", self.latency)
        _require(0.0 < self.duplex <= 1.0, "a link's duplex must be above 0 and at most 1", self.duplex)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of compute of one step: `base` + `per_prompt_token` * tokens of the prompts that it takes in
    + `per_sequence` * its requests, new ones included + `per_context_token` * the tokens of its sequences so far.

    A step that takes in a request costs `opening` more.
    """

    base: float
    per_prompt_token: float = 0.0
    per_sequence: float = 0.0
    per_context_token: float = 0.0
    opening: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            _require(0.0 <= value < math.inf, f"{each.name} of a step must be at least 0 seconds", value)

    def seconds(self, requests: int, prompt_tokens: int = 0, context_tokens: int = 0) -> float:
        fixed = self.base + (self.opening if prompt_tokens else 0.0)
        return (
            fixed
            + self.per_prompt_token * prompt_tokens
            + self.per_sequence * requests
            + self.per_context_token * context_tokens
        )


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """bytes: its parameters on one node. segments: how many pieces a run can wait for one by one.

    continuous: a request runs for as many steps as it has output tokens; otherwise one step answers it.
    cache_bytes_per_token: of the KV cache on one node; 0 without a cache.
    overlaps: if one step answers its requests, several of them are under way in a pipeline at once.
    shares: name of a set of fine-tunes, and `shared` which part of the image, from its beginning, is the same in all.
    """

    name: str
    bytes: int
    step: StepTime
    max_batch_size: int = 16
    max_queue: int = 1_000_000
    continuous: bool = False
    segments: int = 16
    cache_bytes_per_token: float = 0.0
    overlaps: bool = True
    shares: str | None = None
    shared: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("bytes", 0), ("max_batch_size", 1), ("max_queue", 0), ("segments", 1)):
            value = getattr(self, name)
            _require(value >= least, f"{name} of model {self.name!r} must be at least {least}", value)
        cache = self.cache_bytes_per_token
        _require(0.0 <= cache < math.inf, f"cache_bytes_per_token of model {self.name!r} must be at least 0", cache)
        _require(0.0 <= self.shared <= 1.0, f"shared of model {self.name!r} must be a share, 0 to 1", self.shared)

    def pages(self, frame_bytes: int) -> int:
        return math.ceil(self.bytes / frame_bytes)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One group. frames * frame_bytes: the device memory of one node, for parameters and KV caches.

    stages: pipeline stages; so many steps are under way at once, each on one stage at a time, several of one model only
    if one step answers its requests.
    request_overhead: from the client's sending to the scheduler's hearing of it. answer_overhead: from the end of the
    step to the client's having the answer. step_overhead: between the end of a step and the start of the next one.
    block_tokens: tokens of one KV cache block.
    """

    link: Link
    frame_bytes: int
    frames: int
    stages: int = 1
    request_overhead: float = 0.0
    answer_overhead: float = 0.0
    step_overhead: float = 0.0
    block_tokens: int = 16

    def __post_init__(self) -> None:
        for name, least in (("frame_bytes", 1), ("frames", 0), ("stages", 1), ("block_tokens", 1)):
            _require(getattr(self, name) >= least, f"{name} must be at least {least}", getattr(self, name))
        for name in ("request_overhead", "answer_overhead", "step_overhead"):
            value = getattr(self, name)
            _require(0.0 <= value < math.inf, f"{name} must be at least 0 seconds", value)

    def with_frames(self, frames: int) -> Hardware:
        return replace(self, frames=frames)


@dataclass(frozen=True, slots=True)
class Profile:
    """A server in numbers: what `computron bench profile` measures and `computron simulate --profile` reads."""

    hardware: Hardware
    models: tuple[SimulatedModel, ...]
    source: dict[str, str] = field(default_factory=dict)  # what was measured, when, on which machine

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("several models have one name")

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @staticmethod
    def read(path: Path) -> Profile:
        """Raises ValueError with the path and the place if the file is no profile, OSError if it cannot be read."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=Profile)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: {error}; write a profile with `computron bench profile`") from error


def _require(holds: bool, rule: str, value: float) -> None:
    if not holds:
        raise ValueError(f"{rule}, not {value:g}")
