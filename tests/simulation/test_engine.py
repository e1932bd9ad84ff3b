"""The engine beneath all simulated systems, against times worked out by hand."""

from __future__ import annotations

import pytest

from computron.scheduling.actions import CancelSwap, Evict, EvictionReason, RaiseUrgency, Run, SwapIn, Urgency, WakeAt
from computron.scheduling.events import (
    ModelAdded,
    StageFreed,
    StepFinished,
    SwapCancelled,
    SwapFinished,
    TimePassed,
)
from computron.simulation.clock import Clock
from computron.simulation.future import Future
from computron.simulation.group import Live, VirtualGroup
from computron.simulation.hardware import Hardware, Link, SimulatedModel, StepTime
from computron.simulation.link import VirtualLink
from computron.simulation.log import Log
from computron.simulation.pipeline import Pipeline, VirtualStep
from computron.simulation.simulate import model_specs, simulate
from computron.simulation.surroundings import Surroundings
from computron.simulation.systems import System
from computron.simulation.workload import Arrival, Workload

FRAME = 100
DEMAND, PREFETCH = Urgency.DEMAND, Urgency.PREFETCH


def run(clock: Clock, until: float = 1e9) -> None:
    while clock.next_time is not None and clock.next_time <= until:
        clock.advance()
    if until < 1e9:
        clock.now = until


class TestLink:
    """A frame takes one second."""

    def link(self, **settings: float) -> tuple[Clock, VirtualLink, dict[str, float]]:
        clock = Clock()
        return clock, VirtualLink(clock, Link(float(FRAME), **settings), FRAME), {}

    def test_transfer_takes_its_latency_and_its_bytes(self):
        clock, link, ends = self.link(latency=0.5)
        link.bring(3, DEMAND, lambda transfer: ends.update(a=clock.now))
        run(clock)
        assert ends == {"a": 3.5}

    def test_urgent_transfer_overtakes_and_the_other_goes_on_where_it_was(self):
        clock, link, ends = self.link()
        slow = link.bring(10, PREFETCH, lambda transfer: ends.update(slow=clock.now))
        run(clock, 4.0)
        link.bring(2, DEMAND, lambda transfer: ends.update(fast=clock.now))
        run(clock)
        assert ends == {"fast": 6.0, "slow": 12.0}
        assert slow.busy == 10.0
        assert [slow.arrival(frame) for frame in (0, 3, 4, 9)] == [1.0, 4.0, 7.0, 12.0]

    @pytest.mark.parametrize("begin", [0.0, 1e7, 1e8, 1e9])
    def test_transfers_end_however_late_it_is(self, begin: float):
        for part in range(100):
            clock, link, ends = self.link(latency=part / 97)
            clock.now = begin + part / 89
            sent = clock.now
            link.bring(2, DEMAND, lambda transfer, sent=sent, ends=ends, clock=clock: ends.update(a=clock.now - sent))
            for _ in range(3):
                if clock.next_time is not None:
                    clock.advance()
            assert ends == {"a": pytest.approx(2 + part / 97, abs=1e-6)}

    def test_transfers_of_the_same_urgency_follow_each_other(self):
        clock, link, ends = self.link()
        for name in "ab":
            link.bring(2, DEMAND, lambda transfer, name=name: ends.update({name: clock.now}))
        run(clock)
        assert ends == {"a": 2.0, "b": 4.0}

    def test_raised_transfer_overtakes(self):
        clock, link, ends = self.link()
        link.bring(4, PREFETCH, lambda transfer: ends.update(first=clock.now))
        second = link.bring(2, PREFETCH, lambda transfer: ends.update(second=clock.now))
        run(clock, 1.0)
        link.raise_urgency(second, DEMAND)
        run(clock)
        assert ends == {"second": 3.0, "first": 6.0}

    def test_cancelled_transfer_keeps_whole_frames_and_frees_the_link(self):
        clock, link, ends = self.link()
        first = link.bring(4, DEMAND, lambda transfer: ends.update(first=clock.now))
        link.bring(1, DEMAND, lambda transfer: ends.update(second=clock.now))
        run(clock, 2.5)
        link.cancel(first)
        run(clock)
        assert first.arrived == 2
        assert ends == {"second": 3.5}

    def test_directions_slow_each_other_only_while_both_are_busy(self):
        clock, link, ends = self.link(duplex=0.5)
        down = link.bring(4, DEMAND, lambda transfer: ends.update(down=clock.now))
        link.write_back(1, lambda transfer: ends.update(up=clock.now))
        run(clock)
        assert ends == {"up": 2.0, "down": 5.0}
        assert [down.arrival(frame) for frame in range(4)] == [2.0, 3.0, 4.0, 5.0]


class TestPipeline:
    def steps(self, stages: int) -> tuple[Clock, Pipeline, dict[str, float]]:
        clock = Clock()
        return clock, Pipeline(clock, stages), {}

    def step(self, name, clock, ends, compute, arrivals=()):
        return VirtualStep(name, (0,), clock.now, compute, arrivals, lambda step: ends.update({step.model: clock.now}))

    def test_segments_run_as_they_come(self):
        clock, pipeline, ends = self.steps(1)
        pipeline.start(self.step("behind the link", clock, ends, 4.0, (2.0, 4.0, 6.0, 8.0)))
        run(clock)
        assert ends == {"behind the link": 9.0}  # all but the last segment's second hides
        clock, pipeline, ends = self.steps(1)
        pipeline.start(self.step("ahead of it", clock, ends, 8.0, (1.0, 2.0, 3.0, 4.0)))
        run(clock)
        assert ends == {"ahead of it": 9.0}

    def test_stages_work_on_different_steps_at_once(self):
        clock, pipeline, ends = self.steps(2)
        pipeline.start(self.step("a", clock, ends, 4.0))
        pipeline.start(self.step("b", clock, ends, 4.0))
        run(clock)
        assert ends == {"a": 4.0, "b": 6.0}

    def test_stages_of_one_step_load_at_once(self):
        clock, pipeline, ends = self.steps(2)
        pipeline.start(self.step("a", clock, ends, 4.0, (3.0, 6.0)))
        run(clock)
        assert ends == {"a": 9.0}  # stage 0 from 3 to 7, with all of it there; stage 1 two seconds more

    def test_step_without_its_pages_holds_up_the_next(self):
        clock, pipeline, ends = self.steps(1)
        first = self.step("a", clock, ends, 1.0)
        first.arrivals = None
        pipeline.start(first)
        pipeline.start(self.step("b", clock, ends, 1.0))
        run(clock, 5.0)
        assert ends == {}
        first.arrivals = (5.0,)
        pipeline.go_on()
        run(clock)
        assert ends == {"a": 6.0, "b": 7.0}

    def test_the_first_stage_says_when_it_is_done_if_there_are_others(self):
        for stages, expected in ((2, {"a": 2.0, "b": 4.0}), (1, {})):
            clock, pipeline, ends = self.steps(stages)
            freed = {}
            for name in "ab":
                step = self.step(name, clock, ends, 4.0)
                step.freed = lambda step, clock=clock, freed=freed: freed.update({step.model: clock.now})
                pipeline.start(step)
            run(clock)
            assert freed == expected


class Script:
    """Orders what it is told to order after each event of these types; keeps what happened, and when."""

    def __init__(self, **orders) -> None:
        self.orders = {name: list(actions) for name, actions in orders.items()}
        self.happened = []

    def handle(self, event, now):
        self.happened.append((now, event))
        waiting = self.orders.get(type(event).__name__, [])
        return waiting.pop(0) if waiting else []

    def of(self, kind):
        return [(now, event) for now, event in self.happened if isinstance(event, kind)]


def group(script, *models, stages=1, surroundings=None, **link):
    hardware = Hardware(Link(float(FRAME), **link), FRAME, 100, stages)
    clock, log = Clock(), Log(8)
    made = VirtualGroup(0, clock, hardware, models, script, surroundings or Surroundings(), log, Future(()))
    made.add_models(model_specs(models, hardware))
    return clock, made, log


def model(name, pages, compute, segments=1, **more):
    return SimulatedModel(name, pages * FRAME, StepTime(compute), segments=segments, **more)


def swap_in(name, pages, urgency=DEMAND):
    return SwapIn(name, tuple(range(pages)), urgency)


def evict(name, pages):
    return Evict(name, tuple(range(pages)), EvictionReason.DEMAND)


def test_run_ordered_during_its_transfer_hides_behind_it():
    script = Script(RequestArrived=[[swap_in("a", 4), Run("a", (0,))]])
    clock, made, log = group(script, model("a", 4, compute=2.0, segments=4))
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert [now for now, _ in script.of(SwapFinished)] == [4.0]
    assert script.of(StepFinished) == [(4.5, StepFinished("a", (0,), 2.0))]
    assert log.finished[0] == 4.5
    assert (log.steps[0].started, log.steps[0].ended) == (0.0, 4.5)


def test_cancelled_swap_tells_what_came():
    script = Script(RequestArrived=[[swap_in("a", 4), WakeAt(2.5)]], TimePassed=[[CancelSwap("a")]])
    clock, made, log = group(script, model("a", 4, 1.0))
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert script.of(SwapCancelled) == [(2.5, SwapCancelled("a", (0, 1, 2, 3), (0, 1)))]
    assert [(row.frames, row.cancelled) for row in log.swaps] == [(2, True)]


def test_only_the_last_piece_makes_a_model_complete():
    pieces = [SwapIn("a", pages, DEMAND) for pages in ((0, 1), (2, 3), (1, 2, 3))]
    leave = Evict("a", (3, 2, 1), EvictionReason.DEMAND)
    script = Script(RequestArrived=[[pieces[0]]], SwapFinished=[[pieces[1]], [leave, pieces[2]]])
    clock, made, log = group(script, model("a", 4, 1.0))
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert [row.complete for row in log.swaps] == [False, True, True]


def test_later_wake_replaces_an_earlier_one():
    script = Script(RequestArrived=[[WakeAt(1.0), WakeAt(2.0)]])
    clock, made, _ = group(script, model("a", 1, 1.0))
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert script.of(TimePassed) == [(2.0, TimePassed())]


def test_raised_swap_overtakes():
    orders = [[swap_in("a", 4, PREFETCH), swap_in("b", 2, PREFETCH), WakeAt(1.0)]]
    script = Script(RequestArrived=orders, TimePassed=[[RaiseUrgency("b", DEMAND)]])
    clock, made, _ = group(script, model("a", 4, 1.0), model("b", 2, 1.0))
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert [(now, event.model) for now, event in script.of(SwapFinished)] == [(3.0, "b"), (6.0, "a")]


def test_shared_contents_move_once_and_stay_while_anyone_has_them():
    orders = [[swap_in("a", 4)], [swap_in("b", 4)], [evict("a", 4), evict("b", 4)]]
    script = Script(RequestArrived=orders)
    tuned = {"shares": "base", "shared": 0.5}
    clock, made, log = group(script, model("a", 4, 1.0, **tuned), model("b", 4, 1.0, **tuned))
    for name in ("a", "b", "b"):
        made.arrive(0, Arrival(0.0, name))
        run(clock)
    assert [(now, event.pages) for now, event in script.of(SwapFinished)] == [
        (4.0, (0, 1, 2, 3)),
        (6.0, (0, 1, 2, 3)),  # only two of the four move
    ]
    assert [row.frames for row in log.swaps] == [4, 2]
    assert [row.frames for row in log.evictions] == [2, 4]


def test_write_back_slows_the_transfer_beside_it():
    script = Script(RequestArrived=[[evict("a", 2), swap_in("b", 4)]])
    surroundings = Surroundings(write_back=True)
    clock, made, log = group(script, model("a", 2, 1.0), model("b", 4, 1.0), surroundings=surroundings, duplex=0.5)
    made.arrive(0, Arrival(0.0, "b"))
    run(clock)
    assert [now for now, _ in script.of(SwapFinished)] == [6.0]
    assert [row.written for row in log.evictions] == [2.0]


@pytest.mark.parametrize(("behind", "end"), [(False, 1.0), (True, 5.0)])
def test_copies_of_steps_queue_behind_swaps_where_they_share_the_engine(behind: bool, end: float):
    script = Script(RequestArrived=[[swap_in("b", 4), Run("a", (0,))]])
    surroundings = Surroundings(steps_behind_copies=behind)
    clock, made, log = group(script, model("a", 1, 1.0), model("b", 4, 1.0), surroundings=surroundings)
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert log.finished[0] == end


@pytest.mark.parametrize(("silent", "ends"), [(False, [4.0, 6.0, 8.0]), (True, [4.0, 8.0, 12.0])])
def test_steps_of_a_model_that_answers_in_one_overlap_in_the_stages(silent: bool, ends: list[float]):
    workload = Workload("w", ("a",), tuple(Arrival(10.0, "a") for _ in range(3)))
    hardware = Hardware(Link(float(FRAME)), FRAME, 4, stages=2)
    system = System("s", lambda setup: setup.scheduler("default"), surroundings=Surroundings(silent_stages=silent))
    log = simulate(workload, hardware, [model("a", 4, 4.0, max_batch_size=1)], system=system)
    assert [finished - 10.0 for finished in log.finished] == ends


def test_steps_of_one_model_end_in_their_order():
    script = Script(RequestArrived=[[Run("a", (0,))]], StageFreed=[[Run("a", (1,))]])
    clock, made, _ = group(script, model("a", 1, 2.0), stages=2)
    made.arrive(0, Arrival(0.0, "a"))
    made.live[1] = Live(1, Arrival(0.0, "a"), 1)
    run(clock)
    assert [(now, event.finished) for now, event in script.of(StepFinished)] == [(2.0, (0,)), (3.0, (1,))]
    assert [now for now, _ in script.of(StageFreed)] == [1.0, 2.0]
    assert not made.at_work


@pytest.mark.parametrize("settings", [{"continuous": True}, {"overlaps": False}])
def test_a_model_whose_steps_cannot_overlap_does_not_say_when_a_stage_is_free(settings: dict[str, bool]):
    script = Script(RequestArrived=[[Run("a", (0,))]])
    clock, made, _ = group(script, model("a", 1, 2.0, **settings), stages=2)
    made.arrive(0, Arrival(0.0, "a"))
    run(clock)
    assert not script.of(StageFreed)


def test_continuous_request_takes_a_step_for_each_token():
    script = Script(RequestArrived=[[Run("a", (0,))]], StepFinished=[[Run("a", (0,))], [Run("a", (0,))]])
    timed = SimulatedModel("a", FRAME, StepTime(1.0, per_prompt_token=0.1, opening=0.5), continuous=True)
    clock, made, log = group(script, timed)
    made.arrive(0, Arrival(0.0, "a", prompt_tokens=10, output_tokens=3))
    run(clock)
    assert (log.first_token[0], log.finished[0]) == (2.5, 4.5)
    assert not made.live


def test_execution_time_of_a_continuous_request_is_spread_over_its_steps():
    script = Script(RequestArrived=[[Run("a", (0,))]], StepFinished=[[Run("a", (0,))]])
    timed = SimulatedModel("a", FRAME, StepTime(9.0), continuous=True)
    clock, made, log = group(script, timed)
    made.arrive(0, Arrival(0.0, "a", output_tokens=2, seconds=3.0))
    run(clock)
    assert (log.first_token[0], log.finished[0]) == (1.5, 3.0)


def test_models_are_added_before_anything_else():
    script = Script()
    group(script, model("a", 2, 1.0), model("b", 1, 1.0))
    assert [event.spec.model for _, event in script.of(ModelAdded)] == ["a", "b"]


def test_simulation_counts_overheads_and_forgets_the_warm_up():
    hardware = Hardware(Link(float(FRAME)), FRAME, 4, request_overhead=0.25, answer_overhead=0.5)
    workload = Workload("w", ("a",), (Arrival(10.0, "a"),))
    log = simulate(workload, hardware, [model("a", 4, 1.0)])
    assert (log.arrived[0], log.started[0], log.finished[0]) == (10.0, 10.25, 11.75)
    assert not log.swaps  # the model had come before


def test_cold_simulation_waits_for_the_transfer():
    hardware = Hardware(Link(float(FRAME)), FRAME, 4)
    workload = Workload("w", ("a",), (Arrival(1.0, "a"),))
    log = simulate(workload, hardware, [model("a", 4, 1.0)], warm=False)
    assert log.finished[0] == 6.0
    assert [(row.ordered, row.ended, row.frames) for row in log.swaps] == [(1.0, 5.0, 4)]
