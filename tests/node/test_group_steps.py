"""What a leader makes of the reports of its nodes on one step, and on several that are under way at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from computron.errors import ExecutionFailed, GroupBroken, StepLost, SwapFailed
from computron.execution.steps import TokensOutput
from computron.node import group_steps
from computron.node.group_steps import GroupSteps

OUTPUT = TokensOutput(tokens=None)  # type: ignore[arg-type]


class Steps(GroupSteps):
    """All nodes report what is said of a step, or those in `ranks`."""

    def __init__(self, nodes: int = 2, *, chained: bool = False) -> None:
        super().__init__(range(nodes), chained=chained)
        self.all = range(nodes)

    def end_well(self, step, *ranks):
        for rank in ranks or self.all:
            self.succeed(step.number, rank, OUTPUT, 0.0)

    def end_badly(self, step, error, *ranks):
        for rank in ranks or self.all:
            self.fail(step.number, rank, error)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(group_steps, "STRAGGLERS", 0.02)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(group_steps, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def ended(step):
    async with asyncio.timeout(10):
        await step.done


async def test_a_step_ends_with_the_last_node():
    steps = Steps()
    step = steps.begin()
    steps.succeed(step.number, 1, None, 0.5)
    assert not step.done.done()
    steps.succeed(step.number, 0, OUTPUT, 0.25)
    await ended(step)
    assert (step.output, step.torn) == (OUTPUT, False)


async def test_a_model_that_raises_on_all_nodes_leaves_the_group_whole():
    steps = Steps()
    step = steps.begin()
    steps.end_badly(step, ExecutionFailed("its code raised"))
    with pytest.raises(ExecutionFailed, match="its code raised"):
        await ended(step)
    assert not step.torn


async def test_a_pipeline_in_which_all_nodes_failed_is_torn_too():
    steps = Steps(chained=True)
    step = steps.begin()
    steps.end_badly(step, ExecutionFailed("its code raised"))
    assert step.torn


@pytest.mark.parametrize("chained", [False, True])
async def test_a_node_that_fails_alone_tears_the_group(impatient, chained):
    steps = Steps(3, chained=chained)
    step = steps.begin()
    steps.end_well(step, 2)
    steps.end_badly(step, ExecutionFailed("its code raised"), 1)
    with pytest.raises(ExecutionFailed, match="its code raised"):
        await ended(step)
    assert step.torn


async def test_a_failed_swap_ends_the_step_though_another_node_never_reports():
    steps = Steps()
    step = steps.begin()
    steps.end_badly(step, SwapFailed("no pages"), 1)
    assert step.done.done()
    assert step.torn
    steps.end_badly(step, GroupBroken("freed"), 0)
    with pytest.raises(SwapFailed, match="no pages"):
        await ended(step)


async def test_what_failed_first_hand_is_to_blame_and_not_what_followed_from_it():
    steps = Steps()
    step = steps.begin()
    steps.end_badly(step, GroupBroken("node 1 has gone"), 0)
    steps.end_badly(step, SwapFailed("no pages"), 1)
    with pytest.raises(SwapFailed):
        await ended(step)
    assert step.torn


async def test_a_group_that_is_gone_ends_its_steps():
    steps = Steps()
    step = steps.begin()
    steps.tear(GroupBroken("node 1 was lost"))
    with pytest.raises(GroupBroken, match="node 1 was lost"):
        await ended(step)
    steps.end_well(step, 0)


@pytest.mark.parametrize("error", [ExecutionFailed("its code raised"), SwapFailed("no pages"), GroupBroken("gone")])
async def test_a_step_that_fails_ends_after_those_ahead_of_it(impatient, error):
    steps = Steps(3, chained=True)
    ahead, failing = steps.begin(), steps.begin()
    steps.end_well(ahead, 0, 1)
    steps.end_badly(failing, error, 0)
    await asyncio.sleep(0.05)
    assert not failing.done.done()
    steps.end_well(ahead, 2)
    await ended(ahead)
    with pytest.raises(type(error)):
        await ended(failing)
    assert failing.torn


async def test_steps_behind_one_that_tore_the_group_are_lost_by_no_fault_of_theirs(impatient):
    steps = Steps(chained=True)
    failing, missed, bad = steps.begin(), steps.begin(), steps.begin()
    steps.end_badly(missed, GroupBroken("a step failed: its code raised"), 0)
    steps.end_badly(bad, ExecutionFailed("it is bad too"), 0)
    steps.end_badly(failing, ExecutionFailed("its code raised"), 1)
    assert failing.torn
    steps.end_badly(missed, GroupBroken("freed"), 1)
    assert not missed.done.done()
    assert not bad.done.done()
    steps.tear(StepLost("a step did not end on all nodes"))
    with pytest.raises(StepLost, match="a step did not end"):
        await ended(missed)
    with pytest.raises(ExecutionFailed, match="bad too"):
        await ended(bad)


async def test_seconds_are_those_of_all_stages_without_waits(clock):
    steps = Steps(chained=True)
    step = steps.begin()
    clock.now += 2.0
    steps.succeed(step.number, 0, None, 0.5)
    clock.now += 1.0
    steps.succeed(step.number, 1, OUTPUT, 0.25)
    assert step.seconds(tensor_parallel=1) == 2.5


async def test_seconds_behind_the_step_ahead_are_not_those_of_the_step(clock):
    """The second of three stages takes 4 s, the others one."""
    steps = Steps(3, chained=True)
    first = steps.begin()
    for seconds, rank in ((1.0, 0), (4.0, 1), (1.0, 2)):
        clock.now += seconds
        steps.end_well(first, rank)
        if rank == 0:
            second = steps.begin()
            clock.now += 1.0
            steps.end_well(second, 0)
            clock.now -= 1.0
    clock.now += 3.0
    steps.end_well(second, 1)
    clock.now += 1.0
    steps.end_well(second, 2)
    assert first.seconds(tensor_parallel=1) == second.seconds(tensor_parallel=1) == 6.0


async def test_a_stage_is_as_fast_as_its_slowest_node(clock):
    steps = Steps(4, chained=True)
    for _ in range(2):
        step = steps.begin()
        for seconds, rank in ((1.0, 0), (1.0, 1), (2.0, 2), (3.0, 3)):
            clock.now += seconds
            steps.end_well(step, rank)
        assert step.seconds(tensor_parallel=2) == 7.0
        clock.now += 1.0
