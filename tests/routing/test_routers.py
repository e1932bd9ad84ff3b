"""What every router keeps to, and what each is for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from computron.routing import ROUTERS, GroupSize, ModelFacts, NoGroupError, Router, Tuning

GB = 10**9
GROUP = GroupSize(10 * GB, 2 * GB)


def router(name: str, models: int = 8, groups: int = 3, size: int = 4 * GB, guess: float = 0.5) -> Router:
    facts = [ModelFacts(f"m{number}", size) for number in range(models)]
    return Router(ROUTERS[name](), facts, [GROUP] * groups, Tuning(first_guess=guess))


def settle(it: Router, group: int, name: str, now: float = 0.0) -> None:
    """The model is on the group's device."""
    it.reported(group, name, it.fleet.models[name].bytes, now)


def serve(it: Router, name: str, now: float) -> int:
    """A request that is answered at once, wherever it goes."""
    group = it.route(name, now)
    settle(it, group, name, now)
    it.ended(group, name, now, 0.5)
    return group


# Every router


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("seed", range(10))
def test_requests_go_only_to_groups_that_are_up_and_large_enough(name: str, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [GroupSize(draw.choice([3, 5, 8]) * GB, 2 * GB) for _ in range(4)]
    facts = [ModelFacts(f"m{number}", draw.randrange(1, 8 * GB)) for number in range(6)]
    it = Router(ROUTERS[name](), facts, sizes)
    up = [True] * 4
    sent: list[tuple[int, str]] = []
    for moment in range(400):
        match draw.randrange(5):
            case 0 if sent:
                it.ended(*sent.pop(draw.randrange(len(sent))), moment, draw.random())
            case 1:
                group = draw.randrange(4)
                if up[group]:
                    it.lost(group)
                    sent = [item for item in sent if item[0] != group]
                else:
                    it.joined(group)
                up[group] = not up[group]
            case 2:
                group, model = draw.randrange(4), draw.choice(facts)
                it.reported(group, model.name, draw.choice([0, model.bytes // 2, model.bytes]), moment)
            case _:
                model = draw.choice(facts)
                fits = [number for number in range(4) if up[number] and sizes[number].memory >= model.bytes]
                if not fits:
                    with pytest.raises(NoGroupError, match=model.name):
                        it.route(model.name, moment)
                    continue
                group = it.route(model.name, moment)
                assert group in fits
                sent.append((group, model.name))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_history_gives_the_same_choices(name: str) -> None:
    def choices() -> list[int]:
        draw, it = random.Random(7), router(name)
        return [serve(it, f"m{draw.randrange(8)}", float(moment)) for moment in range(200)]

    assert choices() == choices()


@pytest.mark.parametrize("name", ROUTERS)
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(KeyError):
        router(name).route("nobody", 0.0)


@pytest.mark.parametrize("name", ["resident", "least-loaded"])
def test_what_is_everywhere_is_balanced(name: str) -> None:
    it = Router(ROUTERS[name](), [ModelFacts("m0", GB)], [GROUP] * 4)
    for group in range(4):
        settle(it, group, "m0")
    counts = Counter(it.route("m0", 1.0) for _ in range(40))
    assert counts == dict.fromkeys(range(4), 10)


# least-loaded, hash


def test_least_loaded_looks_at_requests_alone() -> None:
    it = router("least-loaded")
    settle(it, 2, "m0")
    assert [it.route("m0", 0.0) for _ in range(4)] == [0, 1, 2, 0]
    it.ended(1, "m0", 1.0)
    assert it.route("m1", 1.0) == 1


def test_a_lost_group_moves_only_its_own_models_by_hash() -> None:
    it = router("hash", models=60)
    before = {name: serve(it, name, 0.0) for name in it.fleet.models}
    assert set(before.values()) == {0, 1, 2}
    it.lost(1)
    after = {name: serve(it, name, 1.0) for name in it.fleet.models}
    assert all(after[name] == group for name, group in before.items() if group != 1)
    assert 1 not in after.values()


# resident


def test_a_model_is_served_where_it_is() -> None:
    it = router("resident")
    settle(it, 2, "m0")
    assert {serve(it, "m0", float(moment)) for moment in range(5)} == {2}


def test_absent_models_spread_over_free_memory() -> None:
    it = router("resident", models=6)
    groups = [serve(it, name, float(moment)) for moment, name in enumerate(it.fleet.models)]
    assert Counter(groups) == {0: 2, 1: 2, 2: 2}  # two of 4 GB fit each


def test_a_model_on_its_way_is_not_brought_twice() -> None:
    it = router("resident", guess=0.1)
    assert it.route("m0", 0.0) == it.route("m0", 0.1)


def test_a_hot_model_is_spread_when_waiting_costs_more_than_bringing_it() -> None:
    it = router("resident", guess=0.5)  # bringing it takes 2 s
    settle(it, 1, "m0")
    choices = [it.route("m0", 1.0) for _ in range(8)]
    assert choices[:4] == [1, 1, 1, 1]
    assert choices[4] != 1


def test_a_copy_that_would_displace_others_costs_more_than_one_into_free_memory() -> None:
    it = router("resident", groups=2, guess=0.5)
    settle(it, 0, "m0", 9.0)
    settle(it, 1, "m1", 9.0)
    settle(it, 1, "m2", 9.0)
    choices = [it.route("m0", 10.0) for _ in range(10)]
    assert choices.index(1) == 6  # 2 s to bring it, and half as much for what leaves


def test_a_cold_model_comes_where_silence_is_longest() -> None:
    it = router("resident", models=10)
    for number in range(6):
        settle(it, number // 2, f"m{number}", [5.0, 9.0, 1.0, 9.0, 7.0, 9.0][number])
    assert it.route("m9", 10.0) == 1  # m2, last used at 1, lives there


def test_a_copy_that_is_needed_no_more_falls_silent() -> None:
    it = router("resident", groups=2)
    for name, group in (("m0", 0), ("m1", 0), ("m0", 1), ("m2", 1)):
        settle(it, group, name)
    assert {serve(it, "m0", float(moment)) for moment in range(1, 20)} == {0}


def test_a_home_that_has_left_is_where_the_model_still_is() -> None:
    it = router("resident", groups=3)
    assert serve(it, "m0", 0.0) == 0
    settle(it, 2, "m0", 0.0)
    it.reported(0, "m0", 0, 1.0)
    assert serve(it, "m0", 2.0) == 2


def test_groups_with_a_quicker_link_are_preferred_for_what_is_absent() -> None:
    it = Router(ROUTERS["resident"](), [ModelFacts("m0", 4 * GB)], [GROUP, GroupSize(10 * GB, 20 * GB)])
    assert it.route("m0", 0.0) == 1
