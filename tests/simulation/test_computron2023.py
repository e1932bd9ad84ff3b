"""The published Computron, turn by turn; its workers; and the paper's figures that follow from both."""

from __future__ import annotations

import statistics

import pytest

from computron.scheduling.actions import Evict, Run, SwapIn, WakeAt
from computron.scheduling.events import ModelAdded, ModelSpec, Request, RequestArrived, TimePassed
from computron.simulation.clock import Clock
from computron.simulation.hardware import Hardware, Link, SimulatedModel, StepTime
from computron.simulation.link import VirtualLink
from computron.simulation.presets import EXPERIMENT_1, EXPERIMENT_2, sent
from computron.simulation.simulate import simulate
from computron.simulation.systems.computron2023 import Computron2023, whole_models
from computron.simulation.worker_group import Answer, MessageTaken, Noticed, Reported
from computron.simulation.workers import Batch, Copy, Polling, Worker, next_poll
from computron.simulation.workload import Arrival, Workload


class Engine:
    """Tells the loop what happens, lets it have its turns, and keeps its orders in words."""

    def __init__(self, cap: int, *models: str, stages: int = 1, batch: int = 8) -> None:
        self.loop = Computron2023(cap, stages)
        self.stages = stages
        self.wake: float | None = None
        self.requests = 0
        self.copies: dict[tuple[str, bool], Copy] = {}
        for name in models:
            self.tell(ModelAdded(ModelSpec(name, (0, 1), (2,), batch)), 0.0)

    def tell(self, event, now: float) -> list[str]:
        words = []
        for order in self.loop.handle(event, now):
            match order:
                case WakeAt(time):
                    self.wake = time
                case Run(model, requests):
                    words.append(f"run {model} {len(requests)}")
                case SwapIn(model):
                    words.append(f"load {model}")
                    self.copies[model, True] = Copy(model, True, 2, now)
                case Evict(model):
                    words.append(f"offload {model}")
                    self.copies[model, False] = Copy(model, False, 2, now)
                case Answer(requests):
                    words.append(f"answer {len(requests)}")
                case Noticed(request):
                    words.append(f"notice {request}")
        return words

    def ask(self, model: str, now: float) -> list[str]:
        self.requests += 1
        return self.tell(RequestArrived(Request(self.requests, model, now)), now)

    def turn(self) -> tuple[float, list[str]]:
        """The next one that the loop asked for."""
        assert self.wake is not None
        now, self.wake = self.wake, None
        return now, self.tell(TimePassed(), now)

    def take(self, now: float) -> None:
        self.tell(MessageTaken(), now)

    def report(self, model: str, load: bool, now: float, stages=None) -> None:
        for stage in range(self.stages) if stages is None else stages:
            self.tell(Reported(stage, self.copies[model, load]), now)

    def loaded(self, *models: str) -> Engine:
        """Each has been loaded, in this order, for a request that has been answered."""
        for model in models:
            now = self.wake or 0.0
            self.ask(model, now)
            for _ in range(2):
                now, words = self.turn()
                self.take(now)
                if words[-1] == f"load {model}":
                    self.report(model, True, now)
                    now, _ = self.turn()
            self.tell(Reported(self.stages - 1, Batch(model, (self.requests,), now, 0.0)), now)
            while self.wake is not None:
                self.turn()
        return self


def test_one_thing_a_turn_and_a_batch_only_once_the_load_was_seen():
    engine = Engine(2, "a", "b", stages=2)
    assert engine.ask("a", 0.001) == ["notice 1"]
    assert engine.ask("b", 0.002) == ["notice 2"]
    assert engine.turn() == (0.010, ["load a"])
    engine.take(0.011)
    assert engine.turn() == (pytest.approx(0.020), ["load b"])
    engine.take(0.021)
    engine.report("a", True, 0.030, stages=[0])
    assert engine.turn()[1] == []
    engine.report("a", True, 0.045, stages=[1])
    assert engine.turn() == (pytest.approx(0.050), [])  # sees the last word of it, after submitting
    assert engine.turn() == (pytest.approx(0.060), ["run a 1"])


def test_full_inbox_stops_the_whole_loop():
    engine = Engine(1, "a").loaded("a")
    start = engine.loop._turn
    engine.ask("a", start)
    assert engine.turn()[1] == ["run a 1"]
    engine.ask("a", start + 0.005)
    assert engine.turn() == (pytest.approx(start + 0.01), [])  # the first message has not been taken
    assert engine.ask("a", start + 0.02) == []
    engine.take(start + 0.03)
    now, words = engine.turn()
    assert (now, words) == (pytest.approx(start + 0.11), ["run a 1", "notice 4"])


def test_offload_and_load_go_out_in_one_turn_of_which_the_load_waits():
    engine = Engine(1, "a", "b").loaded("a")
    start = engine.loop._turn
    engine.ask("b", start)
    assert engine.turn() == (start, ["offload a"])
    engine.take(start + 0.005)
    assert engine.turn() == (pytest.approx(start + 0.1), ["load b"])


def test_least_recently_used_model_leaves_even_with_requests():
    engine = Engine(2, "a", "b", "c").loaded("a", "b")
    start = engine.loop._turn
    engine.ask("c", start)
    engine.ask("a", start + 0.001)
    assert engine.turn()[1] == ["offload a"]


def test_oldest_head_holds_up_younger_ones_while_nobody_can_leave():
    engine = Engine(2, "a", "b", "c").loaded("a")
    start = engine.loop._turn
    engine.ask("b", start)
    engine.turn()
    engine.take(start + 0.001)
    engine.ask("c", start + 0.002)
    engine.ask("a", start + 0.003)
    now, words = engine.turn()
    assert words == ["offload a"]  # though a has a request
    engine.take(now)
    now, words = engine.turn()
    assert words == ["load c"]
    engine.take(now)
    engine.report("a", False, now)
    now, words = engine.turn()
    assert words == []
    assert engine.wake is None  # a is offloaded and oldest; both others are on their way


def test_batches_are_limited():
    engine = Engine(1, "a", batch=2).loaded("a")
    start = engine.loop._turn
    for _ in range(3):
        engine.ask("a", start)
    now, words = engine.turn()
    assert words == ["run a 2"]
    engine.take(now)
    assert engine.turn()[1] == ["run a 1"]


def test_idle_loop_keeps_its_rhythm():
    engine = Engine(1, "a").loaded("a")
    start = engine.loop._turn
    engine.ask("a", start + 7.0 + 0.003)
    assert engine.wake == pytest.approx(start + 7.0 + 0.01)


def test_cap_counts_models_that_fit_whichever_they_are():
    def models(*pages: int) -> list[SimulatedModel]:
        return [SimulatedModel(f"m{place}", count, StepTime(1.0)) for place, count in enumerate(pages)]

    hardware = Hardware(Link(1.0), 1, 10)
    assert whole_models(hardware, models(5, 5, 5)) == 2
    assert whole_models(hardware, models(7, 3, 3)) == 2
    assert whole_models(hardware, models(7, 4, 1)) == 1
    assert whole_models(hardware, models(2, 2)) == 2


POLLING = Polling(receive=1.0, acknowledge=2.0, retry=10.0)


class Pipe:
    """Stages with links on which a frame takes one second."""

    def __init__(self, stages: int) -> None:
        self.clock = Clock()
        self.reports: list[tuple[float, int, str]] = []
        self.workers: list[Worker] = []
        following = None
        for _ in range(stages):
            link = VirtualLink(self.clock, Link(1.0), 1)
            following = Worker(self.clock, link, POLLING, stages, following, self.report, None)
            self.workers.insert(0, following)

    def report(self, worker: Worker, message) -> None:
        self.reports.append((self.clock.now, self.workers.index(worker), message.model))

    def put(self, time: float, message) -> None:
        self.clock.at(time, self.workers[0].put, message)

    def run(self) -> list[tuple[float, int, str]]:
        while self.clock.next_time is not None:
            self.clock.advance()
        assert not any(worker.at_work for worker in self.workers)
        return self.reports


def test_idle_worker_looks_now_and_then():
    pipe = Pipe(1)
    pipe.put(0.25, Batch("a", (0,), 0.25, 0.5))
    pipe.put(1.25, Batch("b", (1,), 1.25, 0.5))  # the worker is busy until 1.5, and takes it at once
    assert pipe.run() == [(1.5, 0, "a"), (2.0, 0, "b")]


def test_stages_load_at_once_and_their_threads_find_out_late():
    pipe = Pipe(2)
    pipe.put(0.5, Copy("a", True, 3, 0.5))
    # Taken at 1 and handed on at once; both copy until 4, and their threads have waited since 2.
    assert pipe.run() == [(4.0, 0, "a"), (4.0, 1, "a")]
    pipe = Pipe(1)
    pipe.put(0.5, Copy("a", True, 0, 0.5))
    assert pipe.run() == [(2.0, 0, "a")]


def test_batch_waits_for_swap_ins_before_it_and_holds_up_what_follows():
    pipe = Pipe(1)
    pipe.put(0.0, Copy("a", True, 5, 0.0))
    pipe.put(1.0, Batch("b", (0,), 1.0, 0.5))
    pipe.put(2.0, Copy("c", False, 1, 2.0))
    # The batch runs from 5 to 5.5; the offload starts then and is noticed at 6.5.
    assert pipe.run() == [(5.0, 0, "a"), (5.5, 0, "b"), (6.5, 0, "c")]


def test_batch_does_not_wait_for_offloads():
    pipe = Pipe(1)
    pipe.put(0.0, Copy("a", False, 5, 0.0))
    pipe.put(1.0, Batch("b", (0,), 1.0, 0.5))
    assert pipe.run() == [(1.5, 0, "b"), (5.0, 0, "a")]


def test_stage_that_finds_the_next_one_full_tries_again_later():
    pipe = Pipe(2)
    for time, name, seconds in ((0.0, "a", 8.0), (1.0, "b", 2.0), (5.0, "c", 2.0)):
        pipe.put(time, Batch(name, (0,), time, seconds))
    # Stage 0: a to 4, b to 5, c to 6. Stage 1: a from 4 to 8, b waits in its inbox, so c goes on at 16.
    assert pipe.run() == [(8.0, 1, "a"), (9.0, 1, "b"), (17.0, 1, "c")]


def test_polls_come_at_their_times():
    assert next_poll(0.0, 1.0, 0.0) == 0.0
    assert next_poll(0.0, 1.0, 0.25) == 1.0
    assert next_poll(0.0, 1.0, 2.0) == 2.0
    assert next_poll(3.0, 1.0, 2.0) == 3.0


def test_every_request_is_answered_once_and_swaps_are_whole_models():
    cell = EXPERIMENT_2[9]
    workload = cell.workload(seed=1)
    log = simulate(workload, cell.hardware, cell.models, system="computron2023")
    pages = cell.models[0].pages(cell.hardware.frame_bytes)
    assert all(0 <= end - begin < 30 for begin, end in zip(log.arrived, log.finished, strict=True))
    assert sum(row.requests for row in log.steps) == len(workload.arrivals)
    assert {row.frames for row in log.swaps} == {row.frames for row in log.evictions} == {pages}


def test_same_seed_same_figures():
    cell = EXPERIMENT_2[4]
    assert cell.reproduction(seed=3) == cell.reproduction(seed=3) != cell.reproduction(seed=4)


def test_published_client_sends_in_pairs():
    drawn = Workload("w", ("a", "b"), tuple(Arrival(time, "a") for time in (1.0, 2.0, 3.0, 4.0, 9.0)))
    assert [arrival.time for arrival in sent(drawn, {"a": 0.5, "b": 0.0})] == [1.5, 1.5, 2.5, 2.5, 7.5]


def test_cells_are_those_of_the_paper():
    assert len(EXPERIMENT_2) == len({cell.name for cell in EXPERIMENT_2}) == 18
    assert EXPERIMENT_2[16].name == "6x4.10-10-10-10-1-1.cv1"
    for cell in EXPERIMENT_2:
        assert whole_models(cell.hardware, cell.models) == cell.resident < len(cell.models)


@pytest.mark.parametrize(
    "run", [run for run in EXPERIMENT_1 if run.name in ("1x1", "2x1", "2x2")], ids=lambda r: r.name
)
def test_experiment_1_comes_out(run):
    """Where one sleep explains it; 4x1, 1x2 and 1x4 took up to 0.28 s longer (docs/benchmarks.md)."""
    assert statistics.fmean(run.responses()) == pytest.approx(run.published, rel=0.04)


@pytest.mark.parametrize(
    ("arrival", "compute"),
    [
        (Arrival(0.0, "a", seconds=3.0), 3.0),  # a trace tells it
        (Arrival(0.0, "a", prompt_tokens=10, output_tokens=3), 2.0 + 2 * 1.0 + 0.01 * (11 + 12)),
    ],
)
def test_whole_answer_is_one_forward(arrival: Arrival, compute: float):
    timed = SimulatedModel("a", 1, StepTime(1.0, per_prompt_token=0.1, per_context_token=0.01), continuous=True)
    log = simulate(Workload("w", ("a",), (arrival,)), Hardware(Link(1.0), 1, 1), [timed], system="computron2023")
    assert [row.compute for row in log.steps] == [pytest.approx(compute)]
    assert compute < log.finished[0] < compute + 0.04
