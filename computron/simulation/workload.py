"""Requests that come: to which model, when, how large. Times are seconds since the beginning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request to come.

    prompt_tokens, output_tokens: of models that generate; the others have one step.
    seconds: compute of this request by itself, where a trace tells it, spread evenly over its steps; it replaces what
    these would take, of all requests in them.
    deadline: seconds after `time` at which an unstarted request is rejected.
    """

    time: float
    model: str
    prompt_tokens: int = 1
    output_tokens: int = 1
    seconds: float | None = None
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """`arrivals` are in order of time. `settings`: how it was made, seed included, to be kept with the results."""

    name: str
    models: tuple[str, ...]
    arrivals: tuple[Arrival, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
