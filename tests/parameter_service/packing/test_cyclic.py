"""The cyclic packer, where the published heuristic slips."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from packing_worlds import job, jobs, placed

from computron.parameter_service.packing import Cyclic, Fleet, Limits


def fleet_of(*places):
    """places: (job, server of each of its blocks)"""
    fleet = Fleet().opened(sorted({server for _, servers in places for server in servers}))
    for load, servers in places:
        fleet = fleet.placing(load, dict(enumerate(servers)))
    return fleet


def test_a_shorter_job_stretches_to_a_whole_number_of_runs_in_a_cycle():
    fleet = fleet_of((job("long", 1.0, [0.1]), "a"), (job("short", 0.45, [0.1]), "a"))
    assert Cyclic().losses(fleet) == {"long": 0.0, "short": pytest.approx(0.1)}


def test_a_job_on_two_aggregators_has_the_longest_of_its_stretches():
    fleet = fleet_of(
        (job("long", 1.0, [0.1]), "a"),
        (job("middle", 0.95, [0.1]), "b"),
        (job("both", 0.45, [0.1, 0.1]), "ab"),
    )
    assert Cyclic().losses(fleet)["both"] == pytest.approx(0.1)  # 0.5 with "long", 0.475 with "middle"


@pytest.mark.parametrize(("one", "other"), ["ab", "ba"])
def test_a_stretched_job_makes_the_cycle_longer_where_it_is_the_longest(one, other):
    fleet = fleet_of(
        (job("long", 1.0, [0.1]), one),
        (job("both", 0.9, [0.1, 0.1]), one + other),
        (job("short", 0.45, [0.1]), other),
    )
    assert Cyclic().losses(fleet) == {"long": 0.0, "both": pytest.approx(0.1), "short": pytest.approx(0.1)}


def test_a_longer_newcomer_may_not_stretch_those_who_are_there_beyond_their_limit():
    packer = Cyclic(Limits(loss=0.1))
    there = placed(packer, [job("short", 0.6, [0.05])])
    assert len(packer.place(there, job("long", 1.0, [0.05])).opened) == 1  # 1.0 instead of 0.6
    assert packer.place(there, job("long", 1.21, [0.05])).opened == ()  # 0.605 instead of 0.6


def test_a_job_s_own_limit_counts():
    packer = Cyclic(Limits(loss=0.1))
    there = placed(packer, [job("strict", 0.6, [0.05], limit=0.001)])
    assert len(packer.place(there, job("long", 1.21, [0.05])).opened) == 1


def test_work_counts_as_often_as_its_job_runs_in_the_cycle():
    packer = Cyclic()
    there = placed(packer, [job("long", 1.0, [0.5])])
    assert packer.place(there, job("four-times", 0.25, [0.12])).opened == ()
    assert len(packer.place(there, job("four-times", 0.25, [0.13])).opened) == 1


def test_the_smallest_free_time_that_is_enough_is_taken():
    packer = Cyclic()
    fleet = fleet_of(
        (job("a", 1.0, [0.2]), ["roomy"]), (job("b", 1.0, [0.6]), ["tight"]), (job("c", 1.0, [0.8]), ["too-tight"])
    )
    assert packer.place(fleet, job("new", 1.0, [0.3])).places == {0: "tight"}


def test_a_job_that_leaves_may_stretch_the_others_and_rebalancing_moves_them():
    packer = Cyclic(Limits(loss=0.1))
    fleet = placed(packer, [job("long", 2.0, [0.1]), job("middle", 1.0, [0.1]), job("third", 0.66, [0.1])])
    assert len(fleet.servers) == 1
    fleet = fleet.without("long")
    assert packer.losses(fleet)["third"] == pytest.approx(0.34)
    fleet = fleet.changed(packer.rebalance(fleet, packer.losses(fleet)))
    assert max(packer.losses(fleet).values()) == 0.0


@given(arriving=jobs())
@settings(max_examples=50, deadline=None)
def test_the_work_of_a_cycle_is_never_longer_than_the_cycle(arriving):
    packer = Cyclic()
    fleet = placed(packer, arriving)
    losses = packer.losses(fleet)
    for held in fleet.servers.values():
        rates = ((1.0 - losses[name]) / fleet.jobs[name].period for name in held)
        assert sum(part.cpu * rate for part, rate in zip(held.values(), rates, strict=True)) <= 1.0 + 1e-9
