"""The state that events change and decisions read: models, requests, frames, and who is on which agenda."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from computron.scheduling.actions import Urgency
from computron.scheduling.agenda import Agenda
from computron.scheduling.estimates import POISSON, Link, Mean
from computron.scheduling.events import ModelSpec, Request
from computron.scheduling.ledger import Ledger, Swap
from computron.scheduling.models import ModelState, Step
from computron.scheduling.tuning import Tuning
from computron.scheduling.waiting import Ticket


class Board:
    """A model with work that could run it now, if it had its pages, is either resident or not, and so on these agendas:
    due_ready, due_absent: by the earliest limit of its requests.
    ready: by rank (priority, then the one that waited longest). absent: the same, unless its pages are on their way.
    A model on none of them costs nothing until an event names it.

    lacking: without work and without some of its pages, the one that lost them last at the end; what is shunned is not.
    idle: without work, holding pages that could be taken, the one longest unused first. busy: the same, with work.
    running: in a step; steps: how many are under way. loading: with a transfer under way, cancelled ones included.
    cached: holding cache frames.
    load_asked, unload_asked: what an operator wants and is not done yet.
    """

    def __init__(self, *, ledger: Ledger, link: Link, max_wait: float, tuning: Tuning, stages: int) -> None:
        self.ledger = ledger
        self.link = link
        self.max_wait = max_wait
        self.tuning = tuning
        self._early_start = tuning.early_start / stages
        self.models: dict[str, ModelState] = {}
        self.tickets: dict[int, Ticket] = {}
        self.due_ready = Agenda()
        self.due_absent = Agenda()
        self.ready = Agenda()
        self.absent = Agenda()
        self._on_resident = (self.due_ready, self.ready)
        self._on_absent = (self.due_absent, self.absent)
        self._on_coming = (self.due_absent,)
        self.idle: dict[str, ModelState] = {}
        self.busy: dict[str, ModelState] = {}
        self.idle_pages = 0
        self.lacking: dict[str, ModelState] = {}
        self.running: dict[str, ModelState] = {}
        self.steps = 0
        self.loading: dict[str, ModelState] = {}
        self.cached: dict[str, ModelState] = {}
        self.load_asked: dict[str, ModelState] = {}
        self.unload_asked: dict[str, ModelState] = {}
        self.complete = 0  # models with every page on the device
        self.stirred = 0  # goes up with everything that may change what an idle link should fetch, but for time
        self.happened = 0  # goes up with everything that may change who should leave, but for the pieces of a swap-in
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._foretold = Agenda()
        self._usual = Mean(tuning.pooled_smoothing, POISSON)  # until requests tell otherwise
        self._largest = 0  # pages of the largest model so far
        self.lead = 0.0  # how long before its limit a request is due
        self._added = 0
        self._pinned_version = 0

    # Models

    def add_model(self, spec: ModelSpec) -> ModelState:
        model = ModelState(spec, self._added, self.tuning, self._usual)
        self._added += 1
        self._largest = max(self._largest, len(spec.pages))
        self._set_lead()
        self.models[spec.model] = model
        self.ledger.add(model.residency)
        if spec.pinned:
            self.ledger.pinned.update(spec.pages)
            self._pinned_version += 1
        self.complete += model.residency.complete
        self.ask(model, load=spec.pinned, unload=False)
        return model

    def remove_model(self, model: ModelState) -> None:
        for ticket in model.tickets():
            self.forget(ticket)
        self.evict(model, model.residency.last_pages(model.residency.count))
        self.complete -= model.residency.complete
        self.set_cache(model, 0)
        self.ledger.remove(model.residency)
        if model.spec.pinned:
            self.ledger.pinned.subtract(model.spec.pages)
            self.ledger.pinned = +self.ledger.pinned
            self._pinned_version += 1
        self.ask(model, load=False, unload=False)
        self._foretold.drop(model)
        self.lacking.pop(model.name, None)
        del self.models[model.name]

    def room_alone(self, model: ModelState) -> int:
        """Frames for the model's cache if it and the pinned models alone were on the device; may be negative."""
        room = model.room_alone
        if room is None or room[0] != self._pinned_version:
            room = model.room_alone = (self._pinned_version, self.ledger.room_alone(model.residency))
        return room[1]

    def link_took(self, frames: int, seconds: float) -> None:
        """A transfer that had the link to itself took so long."""
        self.link.add(frames, seconds)
        self._set_lead()

    def _set_lead(self) -> None:
        """A swap-in, and the turn of another model, may lie between a request and its limit."""
        swap = self.link.seconds(self._largest)
        self.lead = min(self.tuning.lead_share * self.max_wait, (1.0 + self.tuning.keep) * swap)

    # Requests

    def limit(self, since: float, deadline: float | None = None) -> float:
        """When a request that began to wait at `since` shall have been in a step."""
        limit = since + self.max_wait
        return limit if deadline is None else min(limit, deadline)

    def is_due(self, model: ModelState, now: float) -> bool:
        """Has the time come from which on nothing with a later limit may delay the model?"""
        return model.limit - self.lead <= now

    def next_due(self, now: float) -> float | None:
        """When the next model that lacks pages will be due."""
        lead = self.lead
        limit = self.due_absent.first_key()
        if limit is not None and limit[0] - lead <= now:
            limit = self.due_absent.first_above(now, lambda key: key[0] - lead)
        return None if limit is None else limit[0] - lead

    def enqueue(self, request: Request, model: ModelState) -> None:
        ticket = Ticket(request, model, self.limit(request.arrival, request.deadline))
        self.tickets[request.id] = ticket
        self.stirred += 1
        model.waiting.push(ticket)
        model.shunned = False
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id, ticket))
            # Those of requests that have ended must not outnumber the others, or far deadlines would pile up.
            if len(self._deadlines) > 2 * len(self.tickets) + 16:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self.tickets]
                heapq.heapify(self._deadlines)

    def admit(self, ticket: Ticket) -> None:
        ticket.model.waiting.withdraw(ticket)
        ticket.model.admitted[ticket.request.id] = ticket
        ticket.model.held_blocks += ticket.blocks

    def grow(self, ticket: Ticket, blocks: int) -> None:
        """What is admitted will hold so many blocks in its next step."""
        ticket.model.held_blocks += blocks - ticket.blocks
        ticket.blocks = blocks

    def requeue(self, ticket: Ticket) -> None:
        """What was admitted waits again; its limit stays, so that it waits no longer for having lost its place."""
        del ticket.model.admitted[ticket.request.id]
        ticket.model.held_blocks -= ticket.blocks
        ticket.model.waiting.push(ticket)
        self.file(ticket.model)

    def forget(self, ticket: Ticket) -> None:
        """The request has ended, in whichever way."""
        del self.tickets[ticket.request.id]
        if ticket.waiting:
            ticket.model.waiting.withdraw(ticket)
        elif ticket.model.admitted.pop(ticket.request.id, None) is not None:
            ticket.model.held_blocks -= ticket.blocks

    def hides(self, model: ModelState) -> float:
        """Seconds of a transfer that hide behind the model's next step; 0 while that is not known.

        Each stage waits for its own pages, all of which come at the same time: the last stages' compute hides nothing.
        """
        return self._early_start * (model.expected_step() or 0.0)

    def hidden_pages(self, model: ModelState) -> int:
        """How many pages come in that time."""
        return int(self.hides(model) / self.link.frame_seconds)

    def next_deadline(self) -> float | None:
        """The earliest deadline of a request that has not been in a step."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][2].started or deadlines[0][1] not in self.tickets):
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def expired(self, now: float) -> list[Ticket]:
        """Requests whose deadline has come before they were in a step."""
        late: list[Ticket] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            late.append(heapq.heappop(self._deadlines)[2])
        return late

    # The device

    def begin_step(self, model: ModelState, step: Step, now: float) -> None:
        if now >= model.slice_end:  # not anew because others ran meanwhile, or two could take turns for ever
            model.slice_end = now + self.tuning.time_slice
        model.under_way.append(step)
        model.stage_free, model.last_used = False, now
        self.steps += 1
        self.happened += 1
        for ticket in step.tickets.values():
            ticket.started = True
        self.running[model.name] = model
        self.file(model)

    def end_step(self, model: ModelState, now: float) -> None:
        """The first one. To be filed by the caller, who knows what has become of the requests."""
        model.under_way.popleft()
        model.stepped, model.last_used = True, now
        self.steps -= 1
        if not model.under_way:
            model.stage_free = False
            del self.running[model.name]

    def overlaps(self, model: ModelState) -> bool:
        """Is the model in a step, and could it run another one behind that?

        So it is if one pass answers its requests, and the first stage of the pipeline is done with those in a step.
        No page may be on its way: its last step could yet be aborted.
        """
        return model.stage_free and bool(model.waiting) and model.residency.complete

    def begin_swap(
        self, model: ModelState, pages: tuple[int, ...], urgency: Urgency, now: float, expected_end: float
    ) -> Swap:
        swap = self.ledger.order(model.residency, pages, urgency, now, expected_end)
        swap.alone = not self.loading
        self.loading[model.name] = model
        self.file(model)
        return swap

    def end_swap(self, model: ModelState, arrived: Sequence[int]) -> None:
        """To be filed by the caller, who knows how it ended."""
        self.stirred += 1
        self.ledger.finish(model.residency, arrived)
        self.complete += model.residency.complete
        del self.loading[model.name]

    def evict(self, model: ModelState, pages: Sequence[int]) -> None:
        self.complete -= model.residency.complete
        model.begun = False
        model.brought = max(0, model.brought - len(pages))
        self.ledger.evict(model.residency, pages)
        self.complete += model.residency.complete
        self.file(model)

    def set_cache(self, model: ModelState, frames: int) -> None:
        self.stirred += frames < model.residency.cache
        self.ledger.set_cache(model.residency, frames)
        if frames:
            self.cached[model.name] = model
        else:
            self.cached.pop(model.name, None)

    def ask(self, model: ModelState, *, load: bool, unload: bool) -> None:
        """Note what an operator wants of the model; both False once it is done."""
        self.stirred += 1
        model.load_asked, model.unload_asked = load, unload
        _keep(self.load_asked, model, load)
        _keep(self.unload_asked, model, unload)

    # Forecasts

    def foresee(self, model: ModelState, expected: float | None) -> None:
        """Note when the model should be fetched for its next request, if that can be foretold."""
        if expected is None or model.spec.pinned:
            self._foretold.drop(model)
        else:
            start = expected - self.tuning.fetch_lead * self.link.seconds(len(model.spec.pages))
            self._foretold.file(model, (start,))

    def next_foretold(self) -> tuple[float, ModelState] | None:
        """The next model to be fetched ahead, and when."""
        model, key = self._foretold.first(), self._foretold.first_key()
        return None if model is None or key is None else (key[0], model)

    def drop_foretold(self) -> None:
        """The next forecast has been used."""
        model = self._foretold.first()
        if model is not None:
            self._foretold.drop(model)

    # Agendas

    def file(self, model: ModelState) -> None:
        """Put the model where it belongs after anything about it has changed."""
        has_work = model.has_work
        self._file_holder(model, has_work)
        if not has_work or (model.under_way and not self.overlaps(model)):
            model.limit = math.inf
            model.begun = False
            if model.agendas:
                self._move(model, ())
            return
        model.limit, model.rank = self._keys(model)
        agendas: tuple[Agenda, ...] = self._on_resident
        if not model.residency.complete:
            agendas = self._on_coming if model.loading else self._on_absent
        if model.agendas is not agendas:
            self._move(model, agendas)
        agendas[0].file(model, (model.limit,))
        if agendas is not self._on_coming:
            agendas[1].file(model, model.rank)

    def _move(self, model: ModelState, agendas: tuple[Agenda, ...]) -> None:
        """Take the model off those agendas that it does not belong on any more."""
        for agenda in model.agendas:
            if agenda not in agendas:
                agenda.drop(model)
        model.agendas = agendas

    def _keys(self, model: ModelState) -> tuple[float, tuple[float, float]]:
        """Its earliest limit, and its rank. What waits for a place in its own full batch does not count in either, and
        what is in a step does not if the model could run another one.
        """
        waiting, admitted = model.waiting, model.admitted
        if not admitted or model.under_way:
            ticket = waiting.most_urgent()
            return ticket.limit, (-waiting.first_ranked().request.priority, ticket.since)
        limit = min(ticket.limit for ticket in admitted.values())
        since = min(ticket.since for ticket in admitted.values())
        priority = max(ticket.request.priority for ticket in admitted.values())
        if waiting and model.free_slots > 0:
            ticket = waiting.most_urgent()
            limit, since = min(limit, ticket.limit), min(since, ticket.since)
            priority = max(priority, waiting.first_ranked().request.priority)
        return limit, (-priority, since)

    def _file_holder(self, model: ModelState, has_work: bool) -> None:
        """Keep `idle`, `busy`, `lacking` and the count of pages that idle models hold."""
        residency = model.residency
        holders: dict[str, ModelState] | None = None
        lacks = False
        if residency.swap is None and not model.spec.pinned:
            if residency.count and not model.under_way:
                holders = self.busy if has_work else self.idle
            lacks = not has_work and not residency.complete and not model.shunned
        if holders is not model.held_in:
            if model.held_in is not None:
                del model.held_in[model.name]
            if holders is not None:
                holders[model.name] = model
            model.held_in = holders
        pages = residency.count if holders is self.idle else 0
        if lacks != (model.name in self.lacking):
            _keep(self.lacking, model, lacks)
            self.stirred += 1
        self.stirred += pages != model.idle_pages
        self.idle_pages += pages - model.idle_pages
        model.idle_pages = pages

    def check(self) -> None:
        """Raises AssertionError where the books contradict each other."""
        self.ledger.check(model.residency for model in self.models.values())
        for model in self.models.values():
            residency, under_way = model.residency, model.under_way
            has_agenda = self.overlaps(model) if under_way else model.has_work
            assert (model in self.due_ready) == (model in self.ready) == (has_agenda and residency.complete), f"{model}"
            assert (model in self.due_absent) == (has_agenda and not residency.complete), f"{model}"
            assert (model in self.absent) == (has_agenda and not residency.complete and not model.loading), f"{model}"
            assert not has_agenda or (model.limit, model.rank) == self._keys(model), f"{model} has another place"
            assert has_agenda or model.limit == math.inf, f"{model} has no limit"
            assert (model.name in self.loading) == (residency.swap is not None)
            assert (model.name in self.running) == bool(under_way)
            assert (model.name in self.cached) == (residency.cache > 0)
            assert (model.name in self.load_asked, model.name in self.unload_asked) == (
                model.load_asked,
                model.unload_asked,
            )
            assert model.held_blocks == sum(ticket.blocks for ticket in model.admitted.values())
            if under_way:
                assert residency.complete or residency.swap is not None or under_way[0].early
                assert residency.cache >= model.cache_need()
            if len(under_way) > 1:
                assert model.single_pass
                assert residency.complete
                in_step = [request for step in under_way for request in step.tickets]
                assert sorted(in_step) == sorted(model.admitted), f"{model}: its steps are of {in_step}"
            else:
                assert len(model.admitted) <= model.spec.max_batch_size
            assert all(len(step.tickets) <= model.spec.max_batch_size for step in under_way)
        assert self.complete == sum(model.residency.complete for model in self.models.values())
        assert self.idle_pages == sum(model.residency.count for model in self.idle.values())
        assert len(self.tickets) == sum(len(model.tickets()) for model in self.models.values())
        assert self.steps == sum(len(model.under_way) for model in self.models.values())


def _keep(models: dict[str, ModelState], model: ModelState, belongs: bool) -> None:
    """Order of insertion is kept while a model stays."""
    if belongs:
        models.setdefault(model.name, model)
    else:
        models.pop(model.name, None)
