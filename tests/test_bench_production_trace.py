"""How the production trace's benchmark finds its figures. On synthetic requests, whose figures mean nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from computron.simulation.workload import Arrival, Workload

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_trace_replay")


def workload(*arrivals: tuple[float, str, float]) -> Workload:
    requests = tuple(Arrival(time, model, seconds=seconds) for time, model, seconds in arrivals)
    return Workload("test", tuple(dict.fromkeys(model for _, model, _ in arrivals)), requests)


@pytest.mark.parametrize("guess", [1, 5, 6, 7, 20, 32, 40])
@pytest.mark.parametrize("needed", [1, 2, 6, 31, 32, None])
def test_the_smallest_number_that_is_enough_is_found_from_any_guess(
    replayed: ModuleType, guess: int, needed: int | None
) -> None:
    search = replayed.Search()
    search.run(lambda gpus: replayed.Played(float(needed is not None and gpus >= needed), 0.0), guess)
    assert search.needed == needed
    if needed is not None:  # the neighbours were tried
        assert {needed - 1, needed, needed + 1} & set(range(1, 33)) <= set(search.played)


def test_a_number_above_which_more_fails_is_not_enough(replayed: ModuleType) -> None:
    search = replayed.Search()
    search.run(lambda gpus: replayed.Played(float(gpus == 4 or gpus >= 7), 0.0), 4)
    assert search.needed == 7


def test_requests_are_late_by_what_they_wait_in_their_own_queue(replayed: ModuleType) -> None:
    arrivals = workload(*[(0.0, "a", 1.0)] * 6).arrivals
    assert replayed.late_requests(arrivals, 1) == 2  # answered after 1, 2, ..., 6 s; 4 s are allowed
    assert replayed.late_requests(arrivals, 2) == 0


def test_every_model_has_a_gpu_and_those_that_are_late_have_more(replayed: ModuleType) -> None:
    assert replayed.gpu_per_model(workload((0.0, "a", 1.0), (0.0, "b", 1.0))) == (2, 1.0)
    assert replayed.gpu_per_model(workload(*[(0.0, "a", 1.0)] * 6, (0.0, "b", 1.0))) == (3, pytest.approx(5 / 7))


def test_no_request_of_the_replay_waits_longer_than_is_promised(replayed: ModuleType) -> None:
    trace = replayed.replay(replayed.synthetic(0, models=16, days=2), 400, 2)
    models = replayed.checkpoints(trace, 0.1, 0)
    played = replayed.play(trace, models, "default", "resident", 3, 30.0)
    assert played.attainment > 0.5
    assert 0.0 < played.longest_wait <= replayed.wait_bound(trace, models, 30.0)


def test_models_have_the_sizes_that_are_said(replayed: ModuleType) -> None:
    models = replayed.checkpoints(replayed.synthetic(0), 0.1, 3)
    assert all(2e9 <= model.bytes <= 7e9 for model in models)
    assert models == replayed.checkpoints(replayed.synthetic(0), 0.1, 3)


def test_the_quick_run_gives_all_rows_and_a_picture(
    replayed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("bench_production_trace")
    small = replayed.synthetic(0, models=12, days=1)
    monkeypatch.setattr(replayed, "synthetic", lambda seed: small)
    rows, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    script.main(["--quick", "--jobs", "1", "--factors", "400", "--json", str(rows), "--plot", str(picture)])
    given = {row["name"]: row["value"] for row in json.loads(rows.read_text())}
    assert set(script.names((400,), (1,))) <= set(given)
    assert 1 <= given["trace.f400.x1.gpus_default"] <= 33
    assert given["trace.f400.x1.gpus_gpu_per_model"] >= 12
    assert picture.stat().st_size > 0


def test_without_a_trace_only_quick_runs(replayed: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--trace"):
        importlib.import_module("bench_production_trace").main([])
