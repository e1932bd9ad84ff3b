"""Requests that wait, in the two orders in which they may be served: by rank, and by their limit."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from computron.scheduling.events import Request

if TYPE_CHECKING:
    from computron.scheduling.models import ModelState


class Ticket:
    """A request on its way through the scheduler.

    blocks: KV blocks that its next step will hold.
    served: seconds of the steps that it has been in.
    since: when it began to wait: its arrival, or the end of the last step that it was in.
    limit: when it shall have been in a step: `max_wait` after `since`, or its deadline if that is earlier.
    started: it has been in a step; a deadline no longer concerns it.
    waiting: it is in its model's waiting queue.
    """

    __slots__ = ("blocks", "limit", "model", "request", "served", "since", "started", "waiting")

    def __init__(self, request: Request, model: ModelState, limit: float) -> None:
        self.request = request
        self.model = model
        self.blocks = request.cache_blocks
        self.served = 0.0
        self.since = request.arrival
        self.limit = limit
        self.started = False
        self.waiting = False

    def __repr__(self) -> str:
        place = "waiting" if self.waiting else "admitted"
        return (
            f"<request {self.request.id} of {self.model.name}: {place}, {self.blocks} blocks, limit {self.limit:.3f}>"
        )

    @property
    def seniority(self) -> tuple[float, int]:
        """Smaller is older."""
        return (self.request.arrival, self.request.id)


class WaitingQueue(dict[int, Ticket]):
    """One model's waiting requests by id; a dict, so that whether it is empty costs nothing to ask.

    `push` and `withdraw`, and nothing else, change it. Both are O(log n); what was withdrawn leaves the heaps later.
    """

    __slots__ = ("_limits", "_ranked", "_since_total")

    def __init__(self) -> None:
        super().__init__()
        self._ranked: list[tuple[int, float, int, Ticket]] = []
        self._limits: list[tuple[float, int, Ticket]] = []
        self._since_total = 0.0

    def push(self, ticket: Ticket) -> None:
        request = ticket.request
        ticket.waiting = True
        self[request.id] = ticket
        self._since_total += ticket.since
        heapq.heappush(self._ranked, (-request.priority, request.arrival, request.id, ticket))
        heapq.heappush(self._limits, (ticket.limit, request.id, ticket))
        # Entries of removed requests must not outnumber the living, or a queue of cancelled ones would grow for ever.
        if len(self._ranked) > 2 * len(self) + 16:
            self._ranked = [(-t.request.priority, *t.seniority, t) for t in self.values()]
            heapq.heapify(self._ranked)
        if len(self._limits) > 2 * len(self) + 16:
            self._limits = [(t.limit, t.request.id, t) for t in self.values()]
            heapq.heapify(self._limits)

    def withdraw(self, ticket: Ticket) -> None:
        ticket.waiting = False
        del self[ticket.request.id]
        self._since_total -= ticket.since
        if not self:
            self._ranked.clear()
            self._limits.clear()
            self._since_total = 0.0

    def first_ranked(self) -> Ticket:
        """The highest priority, then the oldest. The queue is not empty."""
        ranked = self._ranked
        while not ranked[0][3].waiting:
            heapq.heappop(ranked)
        return ranked[0][3]

    def most_urgent(self) -> Ticket:
        """The one with the earliest limit. The queue is not empty."""
        limits = self._limits
        while not (limits[0][2].waiting and limits[0][2].limit == limits[0][0]):
            heapq.heappop(limits)
        return limits[0][2]

    def first(self, horizon: float) -> Ticket:
        """Who is served next: those whose limit is not after `horizon`, the earliest first; then by rank. Not empty."""
        urgent = self.most_urgent()
        return urgent if urgent.limit <= horizon else self.first_ranked()

    def waited(self, now: float) -> float:
        """Seconds that all of them together have waited."""
        return max(0.0, len(self) * now - self._since_total)
