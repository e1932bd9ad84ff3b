"""Traces of Gavel: what is read, and what is refused with its line."""

from __future__ import annotations

import json

import pytest

from computron.parameter_service.simulation.trace import MODELS, Costs, read_gavel

SPEEDS = {
    "v100": {
        "('LM (batch size 5)', 1)": 50.0,
        "('LM (batch size 5)', 2)": 80.0,
        "('A3C', 1)": {"('A3C', 1)": [1.0, 1.0]},
    }
}


def line(kind="LM (batch size 5)", steps=1000, arrival=10.0, workers=1):
    return f"{kind}\tpython main.py\t--steps\t1\t{steps}\t{arrival:f}\t{workers}\n"


@pytest.fixture
def read(tmp_path):
    def call(*lines, speeds=SPEEDS, **others):
        trace, throughputs = tmp_path / "jobs.trace", tmp_path / "speeds.json"
        trace.write_text("".join(lines))
        throughputs.write_text(speeds if isinstance(speeds, str) else json.dumps(speeds))
        return read_gavel(trace, throughputs, **others)

    return call


def test_an_iteration_is_the_traced_one_and_the_aggregation(read):
    (job,) = read(line(workers=2))
    elements = MODELS["LM"].parameters
    assert job.load.cpu == pytest.approx(elements * (8.4e-3 + 6.4e-3) / 25e6)
    assert job.load.compute == pytest.approx(2 / 80)
    assert (job.steps, job.measured) == (500, True)


def test_a_speed_that_was_not_measured_is_that_of_fewer_workers(read):
    (job,) = read(line(workers=8))
    assert job.load.compute == pytest.approx(2 / 80)
    assert (job.steps, job.measured) == (125, False)


def test_jobs_come_in_the_order_of_arrival(read):
    late, early = line(arrival=5.0), line(arrival=1.0)
    assert [job.load.job for job in read(late, early)] == ["job-2", "job-1"]


def test_blocks_cover_all_parameters_and_are_no_larger_than_asked():
    load = Costs(add=0.0, adam=1.0, adam_bytes=12, block=1 << 20).load("a", MODELS["CycleGAN"], 1, 1e9)
    assert sum(block.cpu for block in load.blocks) == MODELS["CycleGAN"].parameters
    assert max(block.cpu for block in load.blocks) == 1 << 20
    assert sum(block.memory for block in load.blocks) == 12 * MODELS["CycleGAN"].parameters


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("LM (batch size 5)\t1\n", "2 fields separated by tabs instead of 7"),
        (line("GPT"), 'unknown model in "GPT"'),
        (line("A3C"), 'no speed of "A3C" with up to 1 workers'),
        (line(steps="many"), "could not convert string to float"),
    ],
)
def test_a_bad_line_is_named(read, bad, message):
    with pytest.raises(ValueError, match=r"jobs\.trace:2: " + message):
        read(line(), bad)


def test_a_worker_without_speeds_is_refused(read):
    with pytest.raises(ValueError, match=r'no type of worker "h100" \(there are: v100\)'):
        read(line(), worker="h100")


def test_speeds_that_are_no_json_are_refused(read):
    with pytest.raises(ValueError, match=r"speeds\.json: "):
        read(line(), speeds="{")
