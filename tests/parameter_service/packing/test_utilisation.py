"""The packer by utilisation: what it splits, how much it fills, what it predicts."""

from __future__ import annotations

import math

import pytest
from packing_worlds import job, placed

from computron.parameter_service.packing import Fleet, Limits, Utilisation
from computron.parameter_service.packing.queueing import Burst, Wait, wait_of


def waits(bursts, chunk, jitter):
    return [wait_of(place, bursts, chunk, jitter) for place in range(len(bursts))]


def test_a_shared_aggregator_stays_below_its_utilisation():
    packer = Utilisation(Limits(utilisation=0.5))
    fleet = placed(packer, [job(f"job-{n}", 1.0, [0.1]) for n in range(7)])
    assert len(fleet.servers) == 2
    assert all(fleet.utilisation(name) <= 0.5 + 1e-9 for name in fleet.servers)


def test_a_job_that_fills_an_aggregator_has_it_for_itself():
    packer = Utilisation()
    fleet = placed(packer, [job("full", 1.0, [0.95]), job("small", 1.0, [0.01])])
    assert not set(fleet.homes["full"]) & set(fleet.homes["small"])


def test_a_job_is_spread_where_that_makes_it_faster():
    packer = Utilisation()
    fleet = Fleet().opened(["a", "b"])
    fleet = fleet.with_job(new := job("new", 1.0, [0.1] * 4), packer.place(fleet, new))
    assert {name: held.cpu for name, held in fleet.spread("new").items()} == {"a": 0.2, "b": 0.2}
    assert packer.losses(fleet)["new"] == pytest.approx(1 - 1.0 / 0.8)


def test_pieces_shorter_than_worth_a_message_are_not_made():
    packer = Utilisation(Limits(shortest_piece=0.3))
    fleet = Fleet().opened(["a", "b"])
    assert len(set(packer.place(fleet, job("new", 1.0, [0.1] * 4)).places.values())) == 1


def test_a_job_asked_for_on_two_aggregators_may_not_lose_by_having_one():
    packer = Utilisation(Limits(loss=0.1))
    plan = packer.place(Fleet(), job("two", 1.0, [0.4, 0.4], servers=2))  # 1.4 s on one
    assert len(plan.opened) == 2


def test_a_burst_that_leaves_others_no_time_is_not_predicted_to_end():
    whole = Burst(1.0, 1.0, 0.1)
    assert waits([whole, Burst(0.38, 0.01, 0.04)], 1e-3, 0.0)[1].drifting == math.inf


def test_who_is_alone_waits_for_nobody():
    assert waits([Burst(1.0, 0.5, 0.1)], 1e-3, 0.01) == [Wait(0.0, 0.0)]


def test_jobs_of_equal_periods_wait_for_nothing_but_jitter():
    found = waits([Burst(1.0, 0.25, 0.1)] * 3, 1e-3, 0.01)
    assert found == [Wait(0.0, 0.01)] * 3


def test_the_faster_of_two_similar_jobs_falls_in_behind_the_slower_one():
    fast, slow = waits([Burst(1.0, 0.2, 0.1), Burst(1.05, 0.2, 0.105)], 1e-3, 0.0)
    assert fast.in_step == pytest.approx(0.05)
    assert slow == Wait(0.0, 0.0)


def test_a_short_burst_overtakes_a_long_one_but_for_a_chunk():
    short, long = waits([Burst(0.38, 0.01, 0.04), Burst(10.0, 2.0, 1.0)], 1e-3, 0.0)
    overtaking = 0.01 * 0.01 / 2 + 0.24 * 0.0048 / 0.96  # of a burst that is nearly over it waits for the rest
    assert short.drifting == pytest.approx((overtaking / 10.0 + 0.2 * 0.5e-3) / 0.8)
    share = 0.01 / 0.38
    overtaken = share * (1.0 - 0.01 / 2.0)
    residual = (share * 0.01 + share * 1e-3) / 2.0
    assert long.drifting == pytest.approx((residual / (1.0 - share) + 2.0 * overtaken) / (1.0 - overtaken))
