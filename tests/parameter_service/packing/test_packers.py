"""What holds of every packer, whatever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing_worlds import CAPACITY, check, job, jobs, loads, placed, within_limits

from computron.parameter_service.packing import PACKERS, Change, DoesNotFit, Fleet, Limits

MODERATE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BOTH = pytest.mark.parametrize("name", sorted(PACKERS))


@BOTH
@given(arriving=jobs())
@MODERATE
def test_every_block_has_one_place_and_nothing_is_overfull(name, arriving):
    packer = PACKERS[name]()
    fleet = placed(packer, arriving)
    check(fleet, packer)
    within_limits(fleet, packer)
    assert all(fleet.servers.values())  # none was opened for nothing


@BOTH
@given(arriving=jobs())
@MODERATE
def test_the_same_jobs_get_the_same_places(name, arriving):
    assert placed(PACKERS[name](), arriving) == placed(PACKERS[name](), arriving)


@BOTH
@given(arriving=jobs(2), back=loads("back"))
@MODERATE
def test_a_job_that_leaves_leaves_nothing_behind(name, arriving, back):
    packer = PACKERS[name]()
    fleet = placed(packer, arriving)
    plan = packer.place(fleet, back)
    again = fleet.with_job(back, plan).without("back")
    for server in plan.opened:
        again = again.closed(server)
    assert again == fleet
    assert packer.place(again, back) == plan


@BOTH
@given(arriving=jobs(2))
@MODERATE
def test_a_drained_aggregator_is_empty_and_the_others_stay_within_limits(name, arriving):
    packer = PACKERS[name]()
    fleet = placed(packer, arriving)
    for server in fleet.servers:
        change = packer.drain(fleet, server)
        if change is None:
            continue
        after = fleet.changed(change).closed(server)
        check(after, packer)
        within_limits(after, packer)
        assert not change.opened


@BOTH
@given(arriving=jobs(2), leaving=st.sets(st.integers(0, 6)))
@MODERATE
def test_shrinking_ends_and_rebalancing_has_nothing_to_add(name, arriving, leaving):
    packer = PACKERS[name]()
    fleet = placed(packer, arriving)
    for number in leaving & set(range(len(arriving))):
        fleet = fleet.without(f"job-{number}")
    fleet = settled(packer, fleet)
    while (server := packer.shrink(fleet)) is not None:
        change = packer.drain_with_ease(fleet, server)
        assert change is not None
        fleet = fleet.changed(change).closed(server)
    check(fleet, packer)
    assert packer.rebalance(fleet, packer.losses(fleet)) == Change()


@BOTH
@given(arriving=jobs(2), lost=st.lists(st.floats(0.0, 0.9), min_size=7, max_size=7))
@MODERATE
def test_rebalancing_comes_to_rest_whatever_is_observed(name, arriving, lost):
    packer = PACKERS[name]()
    fleet = placed(packer, arriving)
    observed = {load.job: loss for load, loss in zip(arriving, lost, strict=False)}
    for _ in range(len(arriving) + 1):
        change = packer.rebalance(fleet, observed)
        assert len({move.job for move in change.moves}) <= packer.limits.jobs_at_once
        if change == Change():
            break
        fleet = fleet.changed(change)
        check(fleet, packer)
    assert packer.rebalance(fleet, observed) == Change()


@BOTH
@given(arriving=jobs(2))
@MODERATE
def test_draining_is_not_undone_by_the_next_rebalance(name, arriving):
    packer = PACKERS[name]()
    fleet = placed(packer, arriving)
    server = packer.shrink(fleet)
    if server is not None:
        change = packer.drain_with_ease(fleet, server)
        assert change is not None
        after = fleet.changed(change).closed(server)
        assert packer.rebalance(after, packer.losses(after)) == Change()


@BOTH
def test_a_job_slower_than_predicted_gets_aggregators_of_its_own_and_keeps_them(name):
    packer = PACKERS[name]()
    fleet = placed(packer, [job("a", 1.0, [0.1, 0.1]), job("b", 1.0, [0.1])])
    assert len(fleet.servers) == 1
    change = packer.rebalance(fleet, {"a": 0.0, "b": 0.3})
    fleet = fleet.changed(change)
    assert fleet.homes["b"] == change.opened
    assert change.alone == {"b"}
    assert packer.shrink(fleet) is None  # "a" may not join it, nor it "a"
    assert (
        "b"
        not in fleet.with_job(job("c", 1.0, [0.1]), packer.place(fleet, job("c", 1.0, [0.1]))).servers[
            fleet.homes["a"][0]
        ]
    )


@BOTH
def test_a_job_of_which_too_much_was_foreseen_goes_to_a_new_aggregator_that_others_may_share(name):
    packer = PACKERS[name]()
    fleet = Fleet(CAPACITY).opened(["one"])
    for number in range(4):
        fleet = fleet.placing(job(f"job-{number}", 1.0, [0.1, 0.2]), {0: "one", 1: "one"})
    observed = {f"job-{number}": 0.3 for number in range(4)}
    change = packer.rebalance(fleet, packer.losses(fleet) | observed)
    after = fleet.changed(change)
    assert change.alone == frozenset()
    assert len(after.servers) == 2
    within_limits(after, packer)


@BOTH
def test_an_empty_aggregator_is_taken_before_another_is_opened(name):
    packer = PACKERS[name]()
    fleet = placed(packer, [job("a", 1.0, [0.1]), job("b", 1.0, [0.1])]).opened(["empty"])
    change = packer.rebalance(fleet, {"a": 0.0, "b": 0.3})
    assert change.opened == ()
    assert fleet.changed(change).homes["b"] == ("empty",)


@BOTH
def test_a_small_excess_over_the_limit_moves_nothing(name):
    packer = PACKERS[name](Limits(loss=0.1, tolerance=0.2))
    fleet = placed(packer, [job("a", 1.0, [0.1]), job("b", 1.0, [0.1])])
    assert packer.rebalance(fleet, {"a": 0.119, "b": 0.0}) == Change()
    assert packer.rebalance(fleet, {"a": 0.121, "b": 0.0}) != Change()


@BOTH
@pytest.mark.parametrize(
    ("load", "what"),
    [
        (job("a", 1.0, [0.1], memory=1_001), "bytes of memory"),
        (job("a", 1.0, [0.1], network=10_001), "bytes/s of network"),
        (job("a", 1.0, [1.2, 0.1], servers=2), "s of compute thread"),
    ],
    ids=["memory", "network", "cpu"],
)
def test_a_block_too_large_for_any_aggregator_is_to_be_split(name, load, what):
    with pytest.raises(DoesNotFit, match=rf"block 0 needs .* {what} .* split it"):
        PACKERS[name]().place(Fleet(CAPACITY), load)


@BOTH
def test_a_large_job_is_split_over_as_many_aggregators_as_its_memory_needs(name):
    fleet = placed(PACKERS[name](), [job("a", 1.0, [0.01] * 25, memory=100)])
    assert len(fleet.servers) == 3


@BOTH
def test_equal_jobs_share_without_loss(name):
    packer = PACKERS[name](Limits(jitter=0.0))
    fleet = placed(packer, [job(f"job-{n}", 1.0, [0.1, 0.1]) for n in range(4)])
    assert len(fleet.servers) == 1
    assert packer.losses(fleet) == {f"job-{n}": pytest.approx(0.0, abs=1e-9) for n in range(4)}


def settled(packer, fleet):
    while (change := packer.rebalance(fleet, packer.losses(fleet))) != Change():
        fleet = fleet.changed(change)
    for server in list(fleet.servers):
        if not fleet.servers[server]:
            fleet = fleet.closed(server)
    return fleet
