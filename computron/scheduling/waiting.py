"""Requests that wait, in the two orders in which they may be served: by rank, and by the time they are due."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from computron.scheduling.events import Request

if TYPE_CHECKING:
    from computron.scheduling.models import ModelState


class Ticket:
    """A request on its way through the scheduler.

    blocks: KV blocks that its next step will hold.
    since: when it began to wait: its arrival, or the end of the last step that it was in.
    due: from then on nothing that is due later may delay it.
    started: it has been in a step; a deadline no longer concerns it.
    waiting: it is in its model's waiting queue.
    """

    __slots__ = ("blocks", "due", "model", "request", "since", "started", "waiting")

    def __init__(self, request: Request, model: ModelState, due: float) -> None:
        self.request = request
        self.model = model
        self.blocks = request.cache_blocks
        self.since = request.arrival
        self.due = due
        self.started = False
        self.waiting = False

    def __repr__(self) -> str:
        place = "waiting" if self.waiting else "admitted"
        return f"<request {self.request.id} of {self.model.name}: {place}, {self.blocks} blocks, due {self.due:.3f}>"

    @property
    def seniority(self) -> tuple[float, int]:
        """Smaller is older."""
        return (self.request.arrival, self.request.id)


class WaitingQueue:
    """One model's waiting requests. Push, pop and remove are O(log n); removed entries leave the heaps later."""

    __slots__ = ("_dues", "_live", "_ranked", "_since_total")

    def __init__(self) -> None:
        self._live: dict[int, Ticket] = {}
        self._ranked: list[tuple[int, float, int, Ticket]] = []
        self._dues: list[tuple[float, int, Ticket]] = []
        self._since_total = 0.0

    def __len__(self) -> int:
        return len(self._live)

    def tickets(self) -> list[Ticket]:
        return list(self._live.values())

    def push(self, ticket: Ticket) -> None:
        request = ticket.request
        ticket.waiting = True
        self._live[request.id] = ticket
        self._since_total += ticket.since
        heapq.heappush(self._ranked, (-request.priority, request.arrival, request.id, ticket))
        heapq.heappush(self._dues, (ticket.due, request.id, ticket))
        # Entries of removed requests must not outnumber the living, or a queue of cancelled ones would grow for ever.
        if len(self._ranked) > 2 * len(self._live) + 16:
            self._ranked = [(-t.request.priority, *t.seniority, t) for t in self._live.values()]
            heapq.heapify(self._ranked)
        if len(self._dues) > 2 * len(self._live) + 16:
            self._dues = [(t.due, t.request.id, t) for t in self._live.values()]
            heapq.heapify(self._dues)

    def remove(self, ticket: Ticket) -> None:
        ticket.waiting = False
        del self._live[ticket.request.id]
        self._since_total = self._since_total - ticket.since if self._live else 0.0

    def first_ranked(self) -> Ticket:
        """The highest priority, then the oldest. The queue is not empty."""
        ranked = self._ranked
        while not ranked[0][3].waiting:
            heapq.heappop(ranked)
        return ranked[0][3]

    def first_due(self) -> Ticket:
        """The one due first. The queue is not empty."""
        dues = self._dues
        while not (dues[0][2].waiting and dues[0][2].due == dues[0][0]):
            heapq.heappop(dues)
        return dues[0][2]

    def first(self, now: float) -> Ticket:
        """Who is served next: what is due, earliest first; then by rank. The queue is not empty."""
        due = self.first_due()
        return due if due.due <= now else self.first_ranked()

    def waited(self, now: float) -> float:
        """Seconds that all of them together have waited."""
        return max(0.0, len(self._live) * now - self._since_total)
