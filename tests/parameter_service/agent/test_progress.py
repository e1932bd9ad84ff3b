"""Whatever happens, every block sees every step once, with the gradients of all workers."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from computron.parameter_service.agent.actions import Connect, Disconnect, Fail, Send, Wish
from computron.parameter_service.agent.progress import Progress
from computron.parameter_service.wire.messages import (
    Address,
    Applied,
    AskNorms,
    Commit,
    Flush,
    Hosted,
    Hyperparameters,
    Join,
    Joined,
    Moved,
    Norms,
    Placement,
    Push,
    Pushed,
    Refused,
)
from tests.parameter_service.agent.world import World

GROUPS = (Hyperparameters(0.1),)
EVENTS = ["run", "run", "run", "work", "work", "work", "move", "break_link", "recover", "roll_back"]


def check_history(world):
    """Each block's steps come one after the other, none twice."""
    last = [0] * len(world.held)
    for index, step in world.history:
        assert step == last[index] + 1
        last[index] = step
    assert last == [block.applied for block in world.held]


@settings(max_examples=300, deadline=None)
@example(32998996, 3, 3, 6, False, ["run", "work", "work", "run", "run", "move", "break_link", "work", "move", "move"])
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 3),
    aggregators=st.integers(1, 3),
    blocks=st.integers(1, 6),
    shared=st.booleans(),
    events=st.lists(st.sampled_from(EVENTS), max_size=60),
)
def test_no_step_is_lost_or_taken_twice(seed, workers, aggregators, blocks, shared, events):
    world = World(seed, workers, aggregators, blocks, shared)
    for event in events:
        if event == "run":
            world.run(world.random.randint(1, 30))
        elif event == "roll_back":
            world.roll_back(world.random.randint(1, 3))
        else:
            getattr(world, event)()
    world.settle(max(worker.step for worker in world.workers) + 2)
    world.run()
    check_history(world)
    assert len({worker.step for worker in world.workers}) == 1


@pytest.mark.parametrize("eager", [False, True])
def test_blocks_that_hardly_rest_are_found(eager):
    for seed in range(150):
        world = World(seed, 2, 2 + seed % 3, 4, seed % 2 == 0, eager=eager)
        for _ in range(60):
            event = world.random.choice(["run", "run", "work", "move", "move", "move", "break_link"])
            world.run(world.random.randint(1, 10)) if event == "run" else getattr(world, event)()
        world.settle(max(worker.step for worker in world.workers) + 2)
        world.run()
        check_history(world)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), shared=st.booleans(), events=st.lists(st.sampled_from(EVENTS[:-2]), max_size=40))
def test_blocks_are_committed_one_by_one_where_nothing_lasts(seed, shared, events):
    world = World(seed, 2, 2, 4, shared, eager=True)
    for event in events:
        world.run(10) if event == "run" else getattr(world, event)()
    world.settle(max(worker.step for worker in world.workers) + 2)
    world.run()
    check_history(world)


def address(name):
    return Address(name, "host", 1, "machine", "")


def started(*, members=(0,), owners=(0, 1), shared=True, applied=0, eager=False):
    """A worker whose blocks all aggregators have."""
    progress = Progress("job", "token", "me", len(owners), eager=eager)
    names = [f"a{n}" for n in range(max(owners) + 1)]
    addresses = tuple(map(address, names))
    placement = Placement("job", 1, 0, members, owners, addresses, applied)
    assert progress.placed(placement) == [Connect(a) for a in addresses]
    for number, name in enumerate(names):
        assert progress.connected(name, shared) == [Send(name, Join("job", "token", 0, "me", 1, shared))]
        blocks = tuple(Hosted(b, applied, f"m{b}") for b, owner in enumerate(owners) if owner == number)
        progress.joined(name, Joined("job", 1, blocks))
        if not shared:
            for hosted in blocks:
                progress.fills(hosted.block)
                progress.read(name, hosted.block, applied)
    assert progress.ready
    return progress


def commit(step, *blocks):
    return Commit("job", 1, step, GROUPS, blocks)


def test_a_block_that_was_given_on_before_the_worker_heard_of_it_is_found():
    progress = started(owners=(0, 1, 2))
    assert progress.joined("a2", Joined("job", 1, (Hosted(0, 0, "m0"),))) == []
    assert progress.moved("a1", Moved("job", 1, 0, (0,), address("a2"))) == []
    asked = progress.moved("a0", Moved("job", 1, 0, (0,), address("a1")))
    assert asked == [*progress.join("a1"), *progress.join("a2")]
    progress.moved("a1", Moved("job", 1, 0, (0,), address("a2")))  # as it answers
    assert progress.blocks[0].owner == "a2"


def test_an_old_word_does_not_hide_where_a_block_is():
    progress = started(owners=(0, 1))
    progress.moved("a0", Moved("job", 1, 0, (0,), address("a1")))
    progress.moved("a0", Moved("job", 1, 0, (0,), address("a1")))  # asked once more, it says so again
    progress.joined("a1", Joined("job", 1, (Hosted(0, 0, "m0"),)))
    progress.lost("a0")
    assert Connect(address("a0")) in progress.moved("a1", Moved("job", 1, 0, (0,), address("a0")))
    assert progress.blocks[0].owner == "a0"


def test_an_aggregator_that_has_the_name_of_one_that_has_gone_is_another_one():
    progress = started()
    progress.lost("a1")
    successor = Address("a1", "host", 2, "machine", "")
    assert progress.moved("a0", Moved("job", 1, 0, (0,), successor)) == [Connect(successor)]
    assert progress.peers["a1"].address == successor
    assert progress.moved("a0", Moved("job", 1, 0, (0,), successor)) == []


def test_an_aggregator_that_has_nothing_any_more_is_not_called_again_when_it_ends():
    progress = started()
    progress.moved("a1", Moved("job", 1, 0, (1,), address("a0")))
    assert progress.lost("a1") == [Disconnect("a1")]
    assert progress.moved("a0", Moved("job", 1, 0, (0,), address("a1"))) == [Connect(address("a1"))]


def test_a_new_owner_is_asked_once_if_it_told_of_its_blocks_before_the_old_one_did():
    progress = started(owners=(0, 0, 1))
    join = Send("a1", Join("job", "token", 0, "me", 1, True))
    assert progress.joined("a1", Joined("job", 1, (Hosted(0, 0, "m0"),))) == []
    assert progress.moved("a0", Moved("job", 1, 0, (1,), address("a1"))) == []
    assert progress.moved("a0", Moved("job", 1, 0, (0,), address("a1"))) == [join]
    assert progress.joined("a1", Joined("job", 1, (Hosted(0, 0, "m0"), Hosted(1, 0, "m1")))) == []
    assert progress.ready


def test_a_sum_is_committed_block_by_block():
    progress = started(eager=True)
    assert progress.staged(1, [0]) == []
    assert progress.commit(Wish(1, GROUPS), [0]) == [Send("a0", commit(1, 0))]
    assert progress.staged(1, [1]) == []
    assert progress.commit(Wish(1, GROUPS), [1]) == [Send("a1", commit(1, 1))]
    progress.applied("a0", Applied("job", 1, (0,)))
    assert progress.step == 0
    progress.applied("a1", Applied("job", 1, (1,)))
    assert progress.step == 1


@pytest.mark.parametrize("members", [(0,), (0, 1)])
def test_a_worker_commits_when_everything_is_in_place_everywhere(members):
    progress = started(members=members, shared=False)
    assert progress.staged(1, [0]) == [Send("a0", Push("job", 1, 1, 0))]
    assert progress.commit(Wish(1, GROUPS), [0]) == []
    assert progress.staged(1, [1]) == [Send("a1", Push("job", 1, 1, 1))]
    assert progress.commit(Wish(1, GROUPS), [1]) == [Send(a, Flush("job", 1)) for a in ("a0", "a1")]
    assert progress.pushed("a0", Pushed("job", 1)) == []
    assert progress.pushed("a1", Pushed("job", 1)) == [Send("a0", commit(1, 0)), Send("a1", commit(1, 1))]


def test_a_step_that_others_completed_is_not_taken_again():
    progress = started()
    progress.staged(1, [0, 1])
    progress.commit(Wish(1, GROUPS))
    joins = progress.placed(Placement("job", 2, 0, (0,), (0, 0), (address("a0"),), 1))
    assert Send("a0", Join("job", "token", 0, "me", 2, True)) in joins
    assert progress.joined("a0", Joined("job", 2, (Hosted(0, 1, "m0"), Hosted(1, 1, "m1")))) == []
    assert (progress.step, progress.generation) == (1, 0)


def test_a_rollback_drops_what_was_being_worked_on():
    progress = started(applied=7)
    progress.staged(8, [0, 1])
    progress.commit(Wish(8, GROUPS))
    progress.placed(Placement("job", 2, 0, (0,), (0, 0), (address("a0"),), 5))
    assert not progress.ready
    progress.joined("a0", Joined("job", 2, (Hosted(0, 5, "n0"), Hosted(1, 5, "n1"))))
    assert progress.ready
    assert (progress.step, progress.generation, progress.lost_steps) == (5, 1, 2)
    assert progress.commit(Wish(8, GROUPS)) == []


def test_norms_are_asked_for_when_all_is_staged_and_add_up():
    progress = started()
    progress.staged(1, [0])
    assert progress.ask_norms(1, 0.5) == []
    assert progress.staged(1, [1]) == [Send(a, AskNorms("job", 1, 1, 0.5)) for a in ("a0", "a1")]
    progress.norms("a0", Norms("job", 1, ((0, 4.0),)))
    assert progress.squared_norm is None
    progress.norms("a1", Norms("job", 1, ((1, 5.0),)))
    assert progress.squared_norm == 9.0


def test_torn_parameters_are_read_again():
    progress = started(shared=False, owners=(0,))
    progress.staged(1, [0])
    progress.commit(Wish(1, GROUPS))
    progress.fills(0)
    progress.lost("a0")
    assert not progress.ready


@pytest.mark.parametrize(("code", "ends"), [("bad_token", True), ("quota", True), ("stale_epoch", False)])
def test_what_can_pass_is_tried_again(code, ends):
    actions = started().refused("a0", Refused("job", code, "no"))
    assert [isinstance(action, Fail) for action in actions] == [ends]
