"""What the benchmarks of the paper's workloads compute from what they measure."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from computron.simulation.presets import EXPERIMENT_2

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def cells() -> ModuleType:
    return importlib.import_module("_cells")


def test_every_system_gets_the_same_arrivals_whatever_the_number_of_processes(cells: ModuleType) -> None:
    chosen = (EXPERIMENT_2[2], EXPERIMENT_2[11])
    names = ("default", "without prefetch", "computron2023")
    found = [cells.measure(names, range(2), jobs, cells=chosen) for jobs in (1, 2)]
    for alone, together in zip(*found, strict=True):
        assert alone.cell == together.cell
        for seed, (first, second) in enumerate(zip(alone.samples, together.samples, strict=True)):
            requests = len(alone.cell.workload(seed).arrivals)
            assert {len(latencies) for latencies in (*first.latencies.values(), first.reproduced)} == {requests}
            assert all((first.latencies[name] == second.latencies[name]).all() for name in names)


def test_means_are_of_seeds_and_percentiles_of_requests(cells: ModuleType) -> None:
    samples = (
        cells.Sample({"default": np.array([1.0])}, np.array([1.0]), np.array([0.5])),
        cells.Sample({"default": np.array([2.0, 4.0])}, np.array([2.0, 4.0]), np.array([0.5, 1.0])),
    )
    measured = cells.Measured(EXPERIMENT_2[0], samples)
    assert measured.mean("default") == 2.0
    assert measured.p99("default") == pytest.approx(np.percentile([1.0, 2.0, 4.0], 99))
    assert (measured.reproduced, measured.sleepless) == ([1.0, 3.0], [0.5, 0.75])


def test_published_mean_may_lie_on_the_edge_of_the_range(cells: ModuleType) -> None:
    is_inside = importlib.import_module("bench_workloads").is_inside
    published = EXPERIMENT_2[0].published
    for other, inside in ((published, True), (published + 1, False)):
        samples = tuple(cells.Sample({}, np.array([mean]), np.array([mean])) for mean in (other, published + 2))
        assert is_inside(cells.Measured(EXPERIMENT_2[0], samples)) is inside


def test_live_workload_is_the_beginning_of_the_cell_in_another_time() -> None:
    live = importlib.import_module("bench_workloads_live")
    cell = EXPERIMENT_2[4]
    drawn = [arrival for arrival in cell.workload(0).arrivals if arrival.time < 10.0]
    faster = live.faster(cell, 0.25, 10.0, 0).arrivals
    assert [(arrival.time, arrival.model) for arrival in faster] == [(0.25 * a.time, a.model) for a in drawn]
    assert set(live.MODELS) == {arrival.model for arrival in faster}


def test_live_swap_is_as_many_steps_as_in_the_paper() -> None:
    live = importlib.import_module("bench_workloads_live")
    assert pytest.approx(0.26 / 0.0424) == live.SWAP_IN_STEPS
    assert {cell.name for cell in EXPERIMENT_2} > set(live.CELLS)


def test_bound_of_who_cannot_see_the_future(cells: ModuleType) -> None:
    """Three equal models, memory for two: whoever is asked for lacks a third, and some of it hides behind compute."""
    cell = next(cell for cell in EXPERIMENT_2 if cell.rates == (1, 1, 1) and cell.cv == 1.0)
    hardware, model = cell.hardware, cell.models[0]
    swap = model.pages(hardware.frame_bytes) * hardware.frame_bytes / hardware.link.bandwidth
    least = cells.least_mean(cell)
    assert swap / 3 < least < swap / 3 + model.step.base
    samples = cells.measure(("default", "clairvoyant", "all-resident"), range(3), 1, cells=(cell,))
    assert samples[0].mean("default") > least
    assert cells.least_mean(EXPERIMENT_2[0]) is None
