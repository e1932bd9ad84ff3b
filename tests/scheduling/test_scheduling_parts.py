"""The parts below the scheduler: the ledger of frames, waiting queues, agendas, estimates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_device import spec

from computron.scheduling.actions import Urgency
from computron.scheduling.agenda import Agenda
from computron.scheduling.estimates import Arrivals, Link, Mean, distribution, soon
from computron.scheduling.events import Request
from computron.scheduling.ledger import Ledger, Residency
from computron.scheduling.models import ModelState, frames_for
from computron.scheduling.tuning import Tuning
from computron.scheduling.waiting import Ticket, WaitingQueue

TUNING = Tuning()


def usual():
    return Mean(TUNING.pooled_smoothing, 2.0)


def ledger_with(frames, **contents):
    ledger = Ledger(frames)
    models = [Residency(name, pages) for name, pages in contents.items()]
    for model in models:
        ledger.add(model)
    return ledger, *models


def test_shared_page_leaves_with_its_last_holder():
    ledger, a, b = ledger_with(5, a=(1, 2), b=(2, 3))
    for model in (a, b):
        ledger.order(model, model.unmapped(), Urgency.DEMAND, 0.0, 1.0)
        ledger.finish(model, (0, 1))
    assert ledger.free == 2
    ledger.evict(a, [1])
    assert ledger.free == 2
    ledger.evict(b, [0])
    assert ledger.free == 3
    ledger.check([a, b])


def test_repeated_content_within_a_model_takes_one_frame():
    ledger, a = ledger_with(3, a=(7, 7, 8))
    assert ledger.lacking(a) == 2
    assert ledger.order(a, a.unmapped(), Urgency.DEMAND, 0.0, 1.0).frames == 2
    ledger.finish(a, (0, 1, 2))
    ledger.check([a])


def test_cancelled_transfer_keeps_its_frames_until_it_has_ended():
    ledger, a = ledger_with(4, a=(1, 2, 3))
    ledger.order(a, a.unmapped(), Urgency.DEMAND, 0.0, 1.0)
    assert ledger.free == 1
    ledger.finish(a, (0,))
    assert ledger.free == 3
    assert a.unmapped() == (1, 2)
    ledger.check([a])


def test_content_on_its_way_for_another_model_is_awaited():
    ledger, a, b = ledger_with(4, a=(1, 2), b=(2, 3))
    ledger.order(a, a.unmapped(), Urgency.DEMAND, 0.0, 1.0)
    assert ledger.awaited(b) is a
    ledger.finish(a, (0, 1))
    assert ledger.awaited(b) is None
    assert ledger.lacking(b) == 1


def test_rest_of_a_transfer_counts_only_frames_that_are_still_to_be_filled():
    ledger = Ledger(10)
    base, tuned = Residency("base", (1, 2, 3, 4)), Residency("tuned", (11, 12, 2, 3, 13))
    ledger.add(base)
    ledger.add(tuned)
    ledger.order(base, (0, 1, 2, 3), Urgency.DEMAND, 0.0, 1.0)
    ledger.finish(base, (0, 1, 2, 3))
    swap = ledger.order(tuned, (0,), Urgency.DEMAND, 1.0, 2.0)
    assert (swap.rest, swap.completing) == (2, False)
    ledger.finish(tuned, (0,))
    swap = ledger.order(tuned, (1, 2, 3, 4), Urgency.DEMAND, 2.0, 3.0)
    assert (swap.rest, swap.completing) == (0, True)


def test_idle_model_that_generates_is_expected_to_open_with_its_next_step():
    model = ModelState(spec("a", 2, continuous=True, blocks_per_frame=1.0), 0, Tuning(), Mean(0.1, 2.0))
    model.steps.add(2.0, opening=True)
    model.steps.add(0.1, opening=False)
    assert model.expected_step() == 2.0


def test_check_finds_wrong_books():
    ledger, a = ledger_with(4, a=(1, 2))
    ledger.order(a, a.unmapped(), Urgency.DEMAND, 0.0, 1.0)
    ledger.finish(a, (0, 1))
    ledger.free += 1
    with pytest.raises(AssertionError, match="3 frames free, 2 of 4 used"):
        ledger.check([a])


@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_frames_for_blocks_are_enough_and_no_more(blocks, per_frame):
    frames = frames_for(blocks, per_frame)
    assert int(frames * per_frame) >= blocks
    assert frames == 0 or int((frames - 1) * per_frame) < blocks


def queue_of(*requests):
    model = ModelState(spec("a", 1), 0, TUNING, usual())
    queue = WaitingQueue()
    tickets = [Ticket(request, model, request.arrival + 10.0) for request in requests]
    for ticket in tickets:
        queue.push(ticket)
    return queue, tickets


def test_queue_serves_by_priority_then_age_until_something_reaches_its_limit():
    queue, (old, urgent, young) = queue_of(Request(1, "a", 0.0), Request(2, "a", 5.0, priority=1), Request(3, "a", 1.0))
    assert queue.first(horizon=9.0) is urgent
    assert queue.first(horizon=10.0) is old
    queue.withdraw(old)
    queue.withdraw(urgent)
    assert queue.first(horizon=0.0) is young
    assert queue.waited(now=4.0) == pytest.approx(3.0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.floats(0, 100)), max_size=200))
def test_queue_agrees_with_a_sorted_list(steps):
    model = ModelState(spec("a", 1), 0, TUNING, usual())
    queue, living = WaitingQueue(), []
    for number, (push, priority, arrival) in enumerate(steps):
        if push or not living:
            ticket = Ticket(Request(number, "a", arrival, priority), model, arrival)
            living.append(ticket)
            queue.push(ticket)
        else:
            queue.withdraw(living.pop(number % len(living)))
        assert len(queue) == len(living)
        if living:
            assert queue.first_ranked() is min(living, key=lambda t: (-t.request.priority, *t.seniority))
            assert queue.most_urgent() is min(living, key=lambda t: (t.limit, t.request.id))


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 5)), max_size=100))
def test_agenda_agrees_with_a_sorted_list(steps):
    models = [ModelState(spec(f"m{number}", 1), number, TUNING, usual()) for number in range(10)]
    agenda, keys = Agenda(), {}
    for number, key in steps:
        if key is None:
            agenda.drop(models[number])
            keys.pop(number, None)
        else:
            agenda.file(models[number], (key,))
            keys[number] = key
        order = sorted(keys, key=lambda model: (keys[model], model))
        assert [model.number for model in agenda] == order
        assert agenda.head(3) == [models[model] for model in order[:3]]
        above = [keys[model] for model in order if keys[model] > 2]
        assert agenda.first_above(2, lambda filed: filed[0]) == ((above[0],) if above else None)


def arrivals_at(*times):
    arrivals = Arrivals(TUNING, usual())
    for time in times:
        arrivals.add(time)
    return arrivals


def test_regular_requests_come_closer_with_time():
    arrivals = arrivals_at(*range(0, 5000, 10))
    assert arrivals.chance(2.0, 4991) < 0.01
    assert arrivals.chance(2.0, 4999) > 0.7
    assert arrivals.regular_next() == pytest.approx(5000)


def test_model_of_which_little_is_known_varies_as_others_do():
    shared = usual()
    known = Arrivals(TUNING, shared)
    for time in range(0, 5000, 10):
        known.add(time)
    new = Arrivals(TUNING, shared)
    new.add(0)
    new.add(10)
    assert new.variation == pytest.approx(0.0, abs=0.01)
    assert arrivals_at(0, 10).variation > 0.9


def test_requests_of_a_burst_recede_with_time():
    arrivals = arrivals_at(0, 0.1, 0.2, 0.3, 20, 20.1, 20.2, 20.3)
    assert arrivals.chance(1.0, 21.0) < arrivals.chance(1.0, 20.4)
    assert arrivals.regular_next() is None


def test_silence_outweighs_old_habits():
    assert arrivals_at(0, 1, 2, 3).chance(10, 103) == pytest.approx(1 - math.exp(-10 / 100))


def test_model_never_asked_for_is_expected_only_if_somebody_says_so():
    arrivals = arrivals_at()
    assert arrivals.chance(1e9, 5.0) == 0.0
    arrivals.expect(5.0)
    assert arrivals.chance(1.0, 5.0) == 1.0
    assert arrivals.chance(1.0, 9.0) == pytest.approx(1 - math.exp(-1 / 4))
    arrivals.add(10.0)
    assert (arrivals.rate, arrivals.silence(12.0)) == (0.0, 2.0)
    arrivals.expect(13.0)
    assert arrivals.silence(14.0) == 4.0


@pytest.mark.parametrize("variation", [0.0, 0.06, 0.5, 1.0, 4.0, 16.0])
def test_distribution_of_intervals_has_the_mean_and_the_variation_that_were_learnt(variation):
    shape, scale = distribution(variation)
    mean = scale * math.gamma(1 + 1 / shape)
    assert mean == pytest.approx(1.0)
    assert scale**2 * math.gamma(1 + 2 / shape) / mean**2 - 1.0 == pytest.approx(max(variation, 1 / 64), rel=0.05)


def test_chance_of_a_poisson_process_does_not_depend_on_the_silence():
    shape, scale = distribution(1.0)
    for elapsed in (0.0, 1.0, 50.0):
        assert soon(shape, 4.0 * scale, elapsed, 2.0) == pytest.approx(1 - math.exp(-0.5), rel=1e-3)


def test_bandwidth_follows_what_is_measured():
    link = Link(hint=1e9, frame_bytes=10**6, weight=0.5)
    assert link.seconds(1000) == pytest.approx(1.0)
    for _ in range(20):
        link.add(1000, 2.0)
    assert link.seconds(1000) == pytest.approx(2.0, rel=1e-3)
    link.add(0, 1.0)  # a transfer that only mapped pages tells nothing
    assert link.seconds(1000) == pytest.approx(2.0, rel=1e-3)


def test_one_short_page_does_not_change_what_is_known_of_the_link():
    link = Link(hint=200e6, frame_bytes=1 << 20, weight=0.2)
    for _ in range(10):
        link.add(58, 58 * (1 << 20) / 200e6)
    link.add(1, 26_112 / 200e6 / 100)  # the last page of an image is seldom full
    assert link.bandwidth == pytest.approx(200e6, rel=0.01)
