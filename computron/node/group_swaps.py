"""Swaps of a whole group: each node moves its own pages; a swap is over when it is over everywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from computron.memory.swap import SwapOutcome, SwapState


@dataclass(frozen=True, slots=True)
class Merged:
    """`outcome` of the group's swap, and the pages that arrived on a node though the group does not have them."""

    outcome: SwapOutcome
    surplus: Mapping[int, tuple[int, ...]]


@dataclass(slots=True)
class _Swap:
    """`ordered`: the pages of each node that has any of them."""

    pages: tuple[int, ...]
    ordered: Mapping[int, tuple[int, ...]]
    started: float
    outcomes: dict[int, SwapOutcome] = field(default_factory=dict)


class GroupSwaps:
    """A page of the group is that page on every node that has one of this number.

    `page_counts`: for each model, the pages of each node's shard, by rank.
    """

    def __init__(self, page_counts: Mapping[str, Sequence[int]]) -> None:
        self._page_counts = page_counts
        self._under_way: dict[str, _Swap] = {}

    def pages_of(self, model: str, pages: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """These pages of the group as each node's own, in the same order, for the nodes that have any."""
        own = {
            rank: tuple(page for page in pages if page < count) for rank, count in enumerate(self._page_counts[model])
        }
        return {rank: pages for rank, pages in own.items() if pages}

    def begin(self, model: str, pages: Sequence[int]) -> Mapping[int, tuple[int, ...]]:
        """A swap is ordered; gives what each node has to bring."""
        assert model not in self._under_way, f"a swap of {model} is under way"
        swap = _Swap(tuple(pages), self.pages_of(model, pages), time.monotonic())
        self._under_way[model] = swap
        return swap.ordered

    def end(self, rank: int, outcome: SwapOutcome) -> Merged | None:
        """The swap has ended on this node; gives how it ended in all, if it was the last one."""
        swap = self._under_way[outcome.image_id]
        swap.outcomes[rank] = outcome
        if swap.outcomes.keys() != swap.ordered.keys():
            return None
        del self._under_way[outcome.image_id]
        return _merge(outcome.image_id, swap)

    def forget(self) -> None:
        """No node brings anything any more."""
        self._under_way.clear()


def _merge(model: str, swap: _Swap) -> Merged:
    """Failed if it failed anywhere; cancelled if it was anywhere; a page has arrived if it has everywhere."""
    outcomes = swap.outcomes.values()
    states = {outcome.state for outcome in outcomes}
    state: SwapState = "failed" if "failed" in states else "cancelled" if "cancelled" in states else "done"
    arrived: tuple[int, ...] = ()
    if state != "failed":
        lacking = {
            page for rank, outcome in swap.outcomes.items() for page in set(swap.ordered[rank]) - set(outcome.arrived)
        }
        arrived = tuple(page for page in swap.pages if page not in lacking)
    kept = set(arrived)
    surplus = {
        rank: tuple(page for page in outcome.arrived if page not in kept) for rank, outcome in swap.outcomes.items()
    }
    alone = len(swap.ordered) == 1
    errors = [
        f"{each.error}" if alone else f"node {rank}: {each.error}"
        for rank, each in sorted(swap.outcomes.items())
        if each.state == "failed"
    ]
    return Merged(
        SwapOutcome(
            image_id=model,
            pages=swap.pages,
            state=state,
            arrived=arrived,
            seconds=max(outcome.seconds for outcome in outcomes),
            bytes_moved=sum(outcome.bytes_moved for outcome in outcomes),
            error="; ".join(errors) or None,
            started=swap.started,
            finished=time.monotonic(),
        ),
        {rank: pages for rank, pages in surplus.items() if pages},
    )
