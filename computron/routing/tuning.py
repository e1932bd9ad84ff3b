"""The numbers that routers use, each with its meaning. Nothing else in this package is a magic number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a router weighs what it cannot know.

    rent: what a place costs that others would have, as a share of the seconds that filling it takes. 1: all that leaves
        for it has to come back while the model is there; below that, since some is not asked for in that time.
    smoothing: weight of the newest sample in the running mean of a model's seconds for each request.
    first_guess: seconds that a request is taken to need before any request of any model has ended.
    """

    rent: float = 0.5
    smoothing: float = 0.2
    first_guess: float = 1.0
