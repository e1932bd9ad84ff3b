"""Everything that the scheduler knows of one model at one moment."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from computron.scheduling.agenda import Agenda
from computron.scheduling.estimates import Arrivals, Mean, Steps
from computron.scheduling.events import ModelSpec
from computron.scheduling.ledger import Residency
from computron.scheduling.tuning import Tuning
from computron.scheduling.waiting import Ticket, WaitingQueue


def frames_for(blocks: int, blocks_per_frame: float) -> int:
    """The least number of frames whose whole blocks are enough: floor(frames * blocks_per_frame) >= blocks."""
    if blocks == 0:
        return 0
    frames = math.ceil(blocks / blocks_per_frame)
    while math.floor(frames * blocks_per_frame) < blocks:
        frames += 1
    return frames


@dataclass(slots=True)
class Step:
    """A step under way.

    tickets: its requests, by id.
    early: it started before its pages had come.
    opened: those of its requests that it takes in; the others were admitted before.
    cancelled: those whose client has left.
    given_up: its pages will not come, and what waits for them shall not be tried again.
    """

    tickets: dict[int, Ticket]
    early: bool
    opened: tuple[int, ...]
    cancelled: set[int] = field(default_factory=set)
    given_up: bool = False


class ModelState:
    """waiting: not admitted yet. admitted: in a step under way, or paused between two steps with its cache kept.

    under_way: its steps, in the order in which they were ordered and will end. More than one only in a pipeline, if one
    pass answers its requests; then all that are admitted are in one of them.
    """

    __slots__ = (
        "admitted",
        "agendas",
        "arrivals",
        "begun",
        "brought",
        "failures",
        "held_blocks",
        "held_in",
        "idle_pages",
        "last_used",
        "limit",
        "load_asked",
        "name",
        "number",
        "promised",
        "rank",
        "residency",
        "room_alone",
        "shunned",
        "slice_end",
        "spec",
        "stage_free",
        "stepped",
        "steps",
        "turn_end",
        "under_way",
        "unload_asked",
        "waiting",
    )

    def __init__(self, spec: ModelSpec, number: int, tuning: Tuning, usual: Mean) -> None:
        self.spec = spec
        self.name = spec.model
        self.number = number
        self.waiting = WaitingQueue()
        self.admitted: dict[int, Ticket] = {}
        self.held_blocks = 0  # of all that are admitted
        self.under_way: deque[Step] = deque()
        self.stage_free = False  # the first stage of the pipeline is done with the last of them
        self.residency = Residency(spec.model, spec.pages)
        self.arrivals = Arrivals(tuning, usual)
        self.steps = Steps(tuning.smoothing)
        self.last_used = -math.inf
        self.stepped = False  # has run since it came in
        self.begun = False  # the first pieces of a swap-in for its requests have come, and none has left since
        self.brought = 0  # frames that its swap-in has filled since it was last complete
        self.promised: ModelState | None = None  # it has no further step until that one has its pages
        self.turn_end = -math.inf  # until then it keeps its frames while it has work
        self.limit = math.inf  # the earliest of those of requests that it could run now; never if there are none
        self.rank = (0.0, 0.0)  # of the same requests: priority, then how long they wait; smaller comes first
        self.failures = 0  # swap-ins that failed since the last one that did not
        self.agendas: tuple[Agenda, ...] = ()  # those of the board that it is on
        self.held_in: dict[str, ModelState] | None = None  # `idle` or `busy` of the board
        self.idle_pages = 0  # its share of the board's count
        self.room_alone: tuple[int, int] | None = None  # the board's memory of it, and for which set of pinned models
        self.slice_end = -math.inf  # until then it goes on before other models that are resident
        self.shunned = False  # its last swap-in failed, or it was unloaded: not fetched before somebody asks for it
        self.load_asked = False
        self.unload_asked = False

    def __repr__(self) -> str:
        return (
            f"<{self.name}: {self.residency.count}/{len(self.spec.pages)} pages, cache {self.residency.cache}, "
            f"{len(self.waiting)} waiting, {len(self.admitted)} admitted{', running' if self.under_way else ''}>"
        )

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.admitted)

    @property
    def single_pass(self) -> bool:
        """One step answers a request, and leaves nothing behind."""
        return not self.spec.continuous and not self.spec.blocks_per_frame

    @property
    def work(self) -> int:
        """Requests that it would serve if it ran: those in a step are served."""
        return len(self.waiting) + (0 if self.under_way else len(self.admitted))

    def tickets(self) -> list[Ticket]:
        return [*self.admitted.values(), *self.waiting.values()]

    def in_step(self, request: int) -> Step | None:
        """The step that this request is in."""
        return next((step for step in self.under_way if request in step.tickets), None)

    def outside(self) -> list[Ticket]:
        """Its requests that are in no step."""
        return [ticket for ticket in self.tickets() if self.in_step(ticket.request.id) is None]

    @property
    def free_slots(self) -> int:
        return self.spec.max_batch_size - len(self.admitted)

    @property
    def loading(self) -> bool:
        """A transfer of pages that it lacks is under way."""
        return self.residency.swap is not None and not self.residency.swap.cancelled

    @property
    def completing(self) -> bool:
        """The transfer under way is of everything that it lacks."""
        swap = self.residency.swap
        return swap is not None and not swap.cancelled and swap.completing

    def cache_need(self, more_blocks: int = 0) -> int:
        """Frames for the blocks of all admitted sequences, and some more."""
        if not self.spec.blocks_per_frame:
            return 0
        return frames_for(self.held_blocks + more_blocks, self.spec.blocks_per_frame)

    def least_cache_need(self, horizon: float) -> int:
        """Frames without which its next step cannot be: for what is admitted, or else for the first that waits."""
        if self.admitted or not self.waiting:
            return self.cache_need()
        return self.cache_need(self.waiting.first(horizon).blocks)

    def expected_step(self) -> float | None:
        """Seconds of its next step, which takes in new requests if any wait, or if it has none to go on with."""
        return self.steps.expected(opening=bool(self.waiting) or not self.admitted)

    def expected_service(self) -> float:
        """Seconds of compute until a request that starts now is answered; 0 while that is not known."""
        return self.steps.service.value or self.expected_step() or 0.0

    def oldest_arrival(self) -> float:
        """When the oldest of its requests that are in no step came. It has such."""
        times = [] if self.under_way else [ticket.request.arrival for ticket in self.admitted.values()]
        if self.waiting:
            times.append(self.waiting.most_urgent().request.arrival)
        return min(times)

    def waited(self, now: float) -> float:
        """Seconds that its requests together have waited for a step."""
        return self.waiting.waited(now) + sum(now - ticket.since for ticket in self.admitted.values())
