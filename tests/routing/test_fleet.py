"""What a router knows of its groups."""

from __future__ import annotations

import random

import pytest

from computron.routing import Fleet, GroupSize, ModelFacts, Tuning

GB = 10**9
MODELS = [ModelFacts("a", 4 * GB), ModelFacts("b", 2 * GB, batch=4)]


def fleet(groups: int = 2) -> Fleet:
    return Fleet(MODELS, [GroupSize(10 * GB, 2 * GB)] * groups, Tuning(first_guess=0.5))


def test_what_is_sent_is_outstanding_until_it_ends() -> None:
    it = fleet()
    it.sent(1, "a", 0.0)
    it.sent(1, "a", 0.0)
    group = it.groups[1]
    assert (group.outstanding, group.work, group.awaited) == (2, 1.0, 4 * GB)
    it.ended(1, "a", 3.0, 2.0)
    assert (group.outstanding, group.work) == (1, 2.0)
    it.ended(1, "a", 3.0, None)
    assert (group.outstanding, group.work, group.awaited, group.queued) == (0, 0.0, 0, {})
    assert it.groups[0].outstanding == 0


def test_a_batch_is_one_step() -> None:
    it = fleet()
    for _ in range(5):
        it.sent(0, "b", 0.0)
    assert it.groups[0].work == 1.0  # two steps of half a second


def test_steps_are_learnt_for_each_model_and_guessed_from_all() -> None:
    it = fleet()
    it.ended(0, "a", 0.0, 2.0)
    assert it.seconds("a") == 2.0
    assert it.seconds("b") == 2.0
    it.ended(0, "a", 0.0, 3.0)
    assert it.seconds("a") == pytest.approx(2.2)


def test_reports_tell_what_is_free_and_what_is_awaited() -> None:
    it = fleet()
    group = it.groups[0]
    it.sent(0, "a", 0.0)
    it.reported(0, "a", 3 * GB, 1.0)
    assert (group.free, group.awaited) == (7 * GB, 1 * GB)
    it.reported(0, "a", 0, 2.0)
    assert (group.free, group.awaited, group.resident) == (10 * GB, 4 * GB, {})


def test_the_model_that_was_used_longest_ago_is_first() -> None:
    it = fleet()
    it.reported(0, "a", GB, 0.0)
    it.reported(0, "b", GB, 1.0)
    assert it.groups[0].oldest_use() == 0.0
    it.sent(0, "a", 5.0)
    assert it.groups[0].oldest_use() == 1.0


def test_a_lost_group_forgets_everything_and_late_ends_change_nothing() -> None:
    it = fleet()
    it.sent(0, "a", 0.0)
    it.reported(0, "b", GB, 0.0)
    it.lost(0)
    it.ended(0, "a", 1.0, None)
    group = it.groups[0]
    assert (group.up, group.outstanding, group.work, group.awaited, group.free) == (False, 0, 0.0, 0, 10 * GB)
    it.joined(0)
    assert group.up


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_what_happened(seed: int) -> None:
    draw = random.Random(seed)
    it = fleet()
    sent: list[tuple[int, str]] = []
    for moment in range(300):
        model = draw.choice(MODELS)
        match draw.randrange(3):
            case 0:
                sent.append((draw.randrange(2), model.name))
                it.sent(*sent[-1], float(moment))
            case 1 if sent:
                it.ended(*sent.pop(draw.randrange(len(sent))), float(moment), draw.choice([None, draw.random()]))
            case _:
                it.reported(draw.randrange(2), model.name, draw.randrange(model.bytes + 1), float(moment))
        for group in it.groups:
            here = [name for number, name in sent if number == group.number]
            assert group.outstanding == len(here)
            assert group.queued == {name: here.count(name) for name in set(here)}
            assert group.awaited == sum(group.lacks(it.models[name]) for name in set(here))
            assert group.free == group.memory - sum(group.resident.values())
            assert group.work == pytest.approx(sum(group.shares.values()))
            assert list(group.used) == sorted(group.used, key=group.used.__getitem__)
            assert set(group.used) == set(group.resident)
