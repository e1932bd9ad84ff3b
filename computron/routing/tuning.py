"""The numbers that routers use, each with its meaning. Nothing else in this package is a magic number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a router weighs what it cannot know.

    rent: what frames cost that another model would have had, as a share of the seconds that bringing their content
        takes. 1: whatever leaves has to come back some day, and then costs what its place costs now.
    smoothing: weight of the newest sample in the running mean of a model's seconds for each request.
    first_guess: seconds that a request is taken to need before any request of any model has ended.
    """

    rent: float = 1.0
    smoothing: float = 0.2
    first_guess: float = 1.0
