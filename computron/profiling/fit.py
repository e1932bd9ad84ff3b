"""The cost of steps, from sums over steps: least squares with coefficients that are not negative.

What a server tells is the seconds of all steps that a call took. They are linear in what those steps held, as
`StepTime` has it, so that no step needs to be seen by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from computron.simulation.hardware import StepTime

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """What the steps of one call held, summed up: `openings` of the `steps` took in prompts."""

    steps: int
    openings: int
    prompt_tokens: int
    sequences: int
    context_tokens: int

    @property
    def terms(self) -> dict[str, int]:
        return {
            "base": self.steps,
            "per_prompt_token": self.prompt_tokens,
            "per_sequence": self.sequences,
            "per_context_token": self.context_tokens,
            "opening": self.openings,
        }


@dataclass(frozen=True, slots=True)
class Timed:
    """Calls of one shape. `seconds`: of the steps, the median of `repeats` calls."""

    name: str
    work: Work
    seconds: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """`errors`: of each call's seconds as foretold by `step`, relative, in their order."""

    step: StepTime
    errors: tuple[float, ...]

    @property
    def typical_error(self) -> float:
        return statistics.median(abs(error) for error in self.errors)

    @property
    def worst_error(self) -> float:
        return max(abs(error) for error in self.errors)


def fit(calls: Sequence[Timed], terms: Sequence[str]) -> Fitted:
    """`terms`: which of StepTime's coefficients are sought; the others are 0. Relative errors are made small.

    Raises ValueError without calls.
    """
    if not calls:
        raise ValueError("there is nothing to fit")
    rows = np.array([[call.work.terms[term] / call.seconds for term in terms] for call in calls])
    found = non_negative_least_squares(rows, np.ones(len(calls)))
    step = StepTime(**{"base": 0.0, **dict(zip(terms, found.tolist(), strict=True))})
    return Fitted(step, tuple(float(error) for error in rows @ found - 1.0))


def non_negative_least_squares(rows: Vector, wanted: Vector) -> Vector:
    """x >= 0 with the least |rows x - wanted|; `rows`: [equations, unknowns], of a few unknowns.

    The best x solves the unconstrained problem of those of its unknowns that are not 0: all sets of them are tried.
    """
    count = rows.shape[1]
    best, least = np.zeros(count), float(wanted @ wanted)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = rows[:, chosen]
            scale = np.abs(part).max(0)
            if not scale.all():
                continue
            solution, *_ = np.linalg.lstsq(part / scale, wanted, rcond=None)
            rest = part @ (solution / scale) - wanted
            if (solution >= 0.0).all() and (left := float(rest @ rest)) < least - TIE:
                best, least = np.zeros(count), left
                best[list(chosen)] = solution / scale
    return best


TIE = 1e-12  # what more unknowns have to gain
