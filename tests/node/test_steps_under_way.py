"""Several steps of one model under way: who hears of their ends, and when."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from computron.errors import ExecutionFailed, GroupBroken, StepLost, SwapFailed
from computron.execution.requests import StepResult
from computron.node.steps import Steps
from computron.scheduling.actions import Run
from computron.scheduling.events import StageFreed, StepAborted, StepFailed, StepFinished

GATE = SimpleNamespace(computing=lambda now: [])


class Crew:
    """Its steps end as the test says. `dropped`: what the executor has let go of."""

    def __init__(self, overlaps: bool = True) -> None:
        self.ends: dict[tuple[int, ...], asyncio.Future[None]] = {}
        self.freed = {}
        self.dropped: list[int] = []
        self.absent = False
        self.models = {"m": SimpleNamespace(executor=SimpleNamespace(drop=self.dropped.append, overlaps=overlaps))}

    def begin_step(self, model):
        if self.absent:
            raise SwapFailed("pages are missing")
        return GATE

    async def run(self, action, gate, stage_freed):
        end = self.ends[action.requests] = asyncio.get_running_loop().create_future()
        self.freed[action.requests] = stage_freed
        await end
        return StepResult([], action.requests), 1.0

    def device_error(self):
        return None


class Requests:
    def __init__(self) -> None:
        self.failed: dict[int, Exception] = {}
        self.lost: list[int] = []

    def begin_step(self, numbers):
        pass

    def deliver(self, model, result, seconds):
        pass

    def fail(self, numbers, error):
        self.failed |= dict.fromkeys(numbers, error)

    def lose_step(self, numbers, error):
        self.lost += numbers

    def get(self, number):
        return None


@pytest.fixture
def crew():
    return Crew()


@pytest.fixture
def requests():
    return Requests()


@pytest.fixture
def told():
    return []


@pytest.fixture
def steps(requests, told):
    return Steps(requests, told.append, lambda reason: None)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def start(steps, crew, *numbers):
    for number in numbers:
        assert steps.start(crew, Run("m", (number,))) is None
    await settle()


def finished(number):
    return StepFinished("m", (number,), 1.0, {})


async def test_ends_are_told_in_the_order_of_the_steps(steps, crew, told):
    await start(steps, crew, 1, 2, 3)
    crew.ends[2,].set_result(None)
    await settle()
    assert told == []
    crew.ends[1,].set_result(None)
    await settle()
    assert told == [finished(1), finished(2)]
    crew.ends[3,].set_result(None)
    await settle()
    assert told[2:] == [finished(3)]
    assert not steps


async def test_requests_of_a_later_step_hear_of_its_failure_at_once(steps, crew, requests, told):
    await start(steps, crew, 1, 2)
    crew.ends[2,].set_exception(error := ExecutionFailed("no"))
    await settle()
    assert (requests.failed, told) == ({2: error}, [])
    crew.ends[1,].set_result(None)
    await settle()
    assert told == [finished(1), StepFailed("m", (2,))]


async def test_a_step_that_cannot_begin_is_told_after_those_before_it(steps, crew, told):
    await start(steps, crew, 1)
    crew.absent = True
    await start(steps, crew, 2)
    assert told == []
    crew.ends[1,].set_result(None)
    await settle()
    assert told == [finished(1), StepAborted("m")]
    assert steps.start(crew, Run("m", (3,))) == StepAborted("m")
    assert not steps


async def test_of_steps_that_the_group_lost_nothing_is_told(steps, crew, requests, told):
    await start(steps, crew, 1, 2)
    waiting = asyncio.ensure_future(steps.wait())
    for number in (2, 1):
        crew.ends[number,].set_exception(GroupBroken("gone"))
    await waiting
    await settle()
    assert (sorted(requests.lost), told, bool(steps)) == ([1, 2], [], False)


async def test_requests_of_a_step_that_another_one_took_along_are_not_blamed(steps, crew, requests):
    await start(steps, crew, 1)
    crew.ends[1,].set_exception(StepLost("another one failed"))
    await settle()
    assert (requests.lost, bool(steps)) == ([], False)


async def test_an_executor_forgets_requests_after_the_last_step_that_may_know_them(steps, crew):
    await start(steps, crew, 1, 2)
    assert steps.drop_after(SimpleNamespace(model="m", number=9))
    crew.ends[1,].set_result(None)
    await settle()
    assert crew.dropped == []
    crew.ends[2,].set_result(None)
    await settle()
    assert crew.dropped == [9]
    assert not steps.drop_after(SimpleNamespace(model="m", number=10))


@pytest.mark.parametrize(("overlaps", "events"), [(True, [StageFreed("m")]), (False, [])])
async def test_a_free_stage_is_told_of_models_whose_steps_may_overlap(steps, told, overlaps, events):
    crew = Crew(overlaps)
    await start(steps, crew, 1)
    crew.freed[1,]()
    assert told == events
    crew.ends[1,].set_result(None)
    await settle()
