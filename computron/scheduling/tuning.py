"""The numbers by which decisions are weighed, each with its meaning; there are no others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the scheduler weighs what it cannot know.

    keep: a model that came in stays, while it has work, for at least this many times the seconds of its swap-in,
        so that models that displace each other spend at most 1 / (1 + keep) of their time on swapping.
    lead_share: requests go first ahead of their limit by what a swap-in and a turn take, but by no more than this
        share of `max_wait`, or very large models would leave no room for weighing.
    early_start: a run starts before its pages have come once the rest of the transfer takes at most this many times
        what one stage of the pipeline computes of its step. Above 1 so that a step that is longer than estimated still
        hides behind the transfer; 0 never starts early.
    piece: a swap-in that nothing is due for comes in pieces of so many seconds of the link, and its victims leave with
        them. After each one the link decides anew. Long enough that the moment in which the next one is ordered, and
        the link stands still, does not count.
    patience: a swap-in that has begun is overtaken no more once its oldest request has waited for this many times the
        seconds of the whole swap-in.
    sure: a request that is at least this likely is counted on.
    candidates: how many models, the first of their order, are weighed for one decision. Bounds its cost.
    swap_retries: how often a failed swap-in is tried again before the requests that wait for it are rejected.
    smoothing: weight of the newest sample in every running mean.
    prior: as many intervals of all models together count in the variation of a model as if they were its own.
    pooled_smoothing: weight of the newest sample in the variation of all models together.
    quiet: after this many mean intervals without a request, the time of silence is the better forecast of the next one.
    max_variation: ceiling of the squared coefficient of variation of a model's arrivals; a few samples overstate it.
    regular: up to this squared coefficient of variation the next request of a model can be foretold.
    fetch_lead: a model whose next request can be foretold is fetched this many swap-in times before it.
    fetch_margin: pages come ahead of requests only if they are worth this many times those that leave for them, so that
        two models do not take them from each other all the time.
    fetch_chance: and only if they will be asked for at least so likely before those usually are, so that the link does
        not work for next to nothing.
    time_slice: seconds for which a model that generates goes on before others that are resident have their turn. Long
        enough that requests gather meanwhile and share steps, short enough to wait for a first token.
    history: how many of the last events an error tells.
    """

    keep: float = 1.0
    lead_share: float = 0.5
    early_start: float = 1.2
    piece: float = 0.02
    patience: float = 1.0
    sure: float = 0.9
    candidates: int = 16
    swap_retries: int = 2
    smoothing: float = 0.1
    quiet: float = 3.0
    max_variation: float = 16.0
    regular: float = 0.3
    fetch_lead: float = 1.5
    fetch_margin: float = 2.0
    fetch_chance: float = 0.1
    prior: float = 20.0
    pooled_smoothing: float = 0.02
    time_slice: float = 0.5
    history: int = 32
