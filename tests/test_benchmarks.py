"""The benchmarks are not run here: only that each explains itself and gives the names that it promises."""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROMISED = {
    "bench_aggregation": {
        *(f"aggregation.{row}" for row in ("step_overhead", "step_over_bound", "small_step_us", "many_step_us")),
        *(f"aggregation.{row}" for row in ("shm_share", "tcp_share")),
        *(
            f"aggregation.{model}.{figure}"
            for model in ("cnn", "lstm", "transformer", "minilm", "emulated")
            for figure in ("step_p50", "step_p99", "cpu", "over_own", "over_ddp", "over_alone")
        ),
        "aggregation.emulated.reserved_cores",
    },
    "bench_faults": {
        *("faults.kills", "faults.lost_steps", "faults.wrong_parameters", "faults.loss"),
        *(f"faults.{target}.recovery" for target in ("aggregator", "master", "worker")),
    },
    "bench_migration": {
        *(
            f"migration.{way}{row}"
            for way in ("", "tcp.")
            for row in ("exposed_ms", "worst_exposed_ms", "still_ms", "seconds")
        ),
        "migration.restart_ms",
    },
    "bench_transfer": {"transfer.memcpy_share", "transfer.emulated_error"},
    "bench_swap": {"swap.over_bound", "swap.partial.over_bound", "swap.vs_write_back"},
    "bench_exchange": {f"exchange.{nodes}_nodes.{width}.ratio" for nodes in (2, 4) for width in (576, 4096)},
    "bench_first_token": {"first_token.over_pipeline_bound"},
    "bench_generate": {"generate.equal.ratio", "generate.mixed.ratio"},
    "bench_node_memory": {"memory.4x1.share", "memory.2x2.share", "memory.1x4.share"},
    "bench_packing": {
        *(f"packing.trace.{row}" for row in ("cpu_ratio", "bound_ratio", "unrounded_bound_ratio", "two_per_job_ratio")),
        *(
            f"packing.trace.{prefix}{row}"
            for prefix in ("", "cyclic_")
            for row in (
                *("reserved_ratio", "over_bound", "worst_loss", "mean_loss", "moves_per_job"),
                *("simulated_worst_loss", "simulated_mean_loss", "simulated_over_limit"),
            )
        ),
        *(
            f"packing.trace.limit_{limit}.{row}"
            for limit in ("0.05", "0.2")
            for row in (
                *("reserved_ratio", "simulated_over_limit"),
                *("cyclic_reserved_ratio", "cyclic_simulated_over_limit"),
            )
        ),
        *(
            f"packing.{count}jobs.{shape}.{row}"
            for count in (2, 3, 4)
            for shape in ("alexnet", "vgg19", "awd_lm", "bert")
            for row in ("aggregators", "loss", "worst_loss")
        ),
        *(f"packing.mixed.{row}" for row in ("reserved_ratio", "worst_loss", "mean_loss", "cpu_ratio")),
    },
    "bench_parallel_swap": {
        *(f"parallel.{grid}.load_speedup" for grid in ("2x1", "4x1", "1x2", "1x4", "2x2")),
        *(f"parallel.{grid}.overhead_ms" for grid in ("1x1", "2x1", "4x1", "1x2", "1x4", "2x2")),
    },
    "bench_overhead": {"overhead.rps_share", "overhead.added_p50_ms"},
    "bench_rivals": {
        f"rivals.{rival}.{figure}"
        for rival in (
            *("ray_serve", "torch_to", "switcher", "transformers_serve", "vllm_cpu"),
            *("embed.ray_serve", "embed.torch_to", "embed.switcher"),
        )
        for figure in ("median_ratio", "p99_ratio")
    },
    "bench_production_trace": {
        f"trace.f{factor}.x{rate}.{row}"
        for factor in (20, 100, 400)
        for rate in (1, 4, 8)
        for row in ("gpus_default", "gpus_computron2023", "gpus_all_resident", "gpus_gpu_per_model", "longest_wait")
    },
    "bench_simulation_fidelity": {
        f"fidelity.{workload}.p{share}_error"
        for workload in (
            *("embed_uniform_cv0.25", "embed_uniform_cv1", "embed_skewed_cv4"),
            *("generate_uniform_cv0.25", "generate_skewed_cv1", "generate_skewed_cv4"),
        )
        for share in (50, 99)
    },
    "bench_workloads": {
        *(
            f"cells.{cell}.cv{cv}.{row}"
            for cell in (
                *("3x2.1-1-1", "3x2.10-1-1", "3x2.10-10-1"),
                *("6x4.1-1-1-1-1-1", "6x4.10-10-1-1-1-1", "6x4.10-10-10-10-1-1"),
            )
            for cv in ("0.25", "1", "4")
            for row in (
                *(
                    "mean_ratio",
                    "p99_ratio",
                    "over_clairvoyant",
                    "over_clairvoyant_default",
                    "over_told",
                    "over_all_resident",
                ),
                *("published", "lowest", "highest"),
            )
        ),
        *(
            f"cells.{cell}.cv1.{row}"
            for cell in (
                *("3x2.1-1-1", "3x2.10-1-1", "3x2.10-10-1"),
                *("6x4.1-1-1-1-1-1", "6x4.10-10-1-1-1-1", "6x4.10-10-10-10-1-1"),
            )
            for row in ("over_bound", "bound_over_clairvoyant")
        ),
        *("reproduction.cells_inside", "reproduction.geometric_mean", "reproduction.sleepless"),
        *(f"experiment1.{grid}.response" for grid in ("1x1", "2x1", "4x1", "1x2", "1x4", "2x2")),
        *(
            f"generations.{way}.{row}"
            for way in ("lru", "all-resident", "without_time_slice", "without_seniority")
            for row in ("mean", "p99")
        ),
        *(
            f"without.{part}.{row}"
            for part in (
                *("prefetch", "pieces", "early_start", "overlap", "weighing", "expectation"),
                *("dropping_weights", "own_small_copies"),
            )
            for row in ("cv0.25", "cv1", "cv4", "worst")
        ),
    },
    "bench_workloads_live": {
        *("live.step_seconds", "live.swap_seconds", "live.workload_seconds"),
        *(
            f"live.{cell}.{row}"
            for cell in ("3x2.1-1-1.cv0.25", "3x2.10-1-1.cv0.25", "3x2.10-1-1.cv1", "3x2.10-1-1.cv4")
            for row in ("over_lru", "over_all_resident", "p99_over_lru", "p99_over_all_resident")
        ),
    },
    "bench_scheduler": {
        *(f"scheduler.{name}" for name in ("us_per_event", "p50_us", "p99_us", "max_us", "requests_per_second")),
        *(f"scheduler.idle_{count}.us_per_event" for count in (100, 1_000, 10_000)),
        *(f"scheduler.pages_{count}.us_per_event" for count in (16, 160, 1_600)),
    },
}


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def common() -> ModuleType:
    return importlib.import_module("_common")


def options(**given: Path) -> argparse.Namespace:
    return argparse.Namespace(**{"json": None, "plot": None, **given})


def test_every_script_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("bench_*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_help_is_given_and_nothing_measured(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--quick", "--json", "--plot", "--device", "--seed"))


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_required_names_are_promised(name: str) -> None:
    assert set(importlib.import_module(name).NAMES) == PROMISED[name]


def test_report_refuses_to_leave_out_a_promised_row(common: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    report = common.Report("title", options(json=file), ("a.given", "a.forgotten"))
    report.row("a.given", 1.0, "s")
    with pytest.raises(RuntimeError, match=r"did not give: a\.forgotten"):
        report.finish()
    assert not file.exists()


def test_report_writes_rows_as_json(common: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    report = common.Report("title", options(json=file), ("a.given",))
    report.row("a.given", 2.0, "s", 1.0, 2.0)
    report.finish()
    assert json.loads(file.read_text()) == [
        {"name": "a.given", "value": 2.0, "unit": "s", "baseline": 1.0, "ratio": 2.0}
    ]


def test_plot_that_nothing_draws_is_said(
    common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "picture.png"
    common.Report("title", options(plot=file), ()).finish()
    assert "nothing to draw" in " ".join(capsys.readouterr().out.split())
    assert not file.exists()


def test_stage_times_leave_waits_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("bench_first_token")
    clock = iter([10.0, 11.0, 15.0, 17.0, 20.0, 21.0])  # began; waits of 4 s and 3 s; ended
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))

    class Closed:
        def wait(self, segment: int, stream: int = 0) -> None: ...

    timed = module.Timed(Closed(), cuda=False)
    began = timed.now()
    timed.wait(0)
    timed.wait(1)
    ended = timed.now()
    assert (began, timed.asked, ended) == (10.0, {0: 11.0, 1: 13.0}, 14.0)


def test_perfect_pipeline_waits_for_bytes_and_for_the_stage_before() -> None:
    bound = importlib.import_module("bench_first_token").perfect_pipeline
    assert bound([10, 10, 10], 10.0, [0.5, 0.5, 0.5]) == 3.5  # the link is slower
    assert bound([10, 10, 10], 10.0, [2.0, 2.0, 2.0]) == 7.0  # the device is slower


def test_overhead_is_what_load_and_step_leave_of_a_response() -> None:
    answer = importlib.import_module("_parallel_nodes").Answer
    overheads = importlib.import_module("bench_parallel_swap").overheads
    (overhead,) = overheads([answer(response=2.0, queue=1.25, first_output=1.5, load=1.0, nbytes=1)])
    assert (overhead.until_step, overhead.http, overhead.all) == (0.25, 0.5, 0.75)


def test_overhead_is_refused_where_a_step_began_during_the_load() -> None:
    answer = importlib.import_module("_parallel_nodes").Answer
    overheads = importlib.import_module("bench_parallel_swap").overheads
    with pytest.raises(RuntimeError, match="before its model had come"):
        overheads([answer(response=1.1, queue=0.01, first_output=1.05, load=1.0, nbytes=1)])


@pytest.mark.parametrize(("gpus", "demanded", "count"), [(4, False, 6), (2, False, 3), (1, True, 1), (1, False, 0)])
def test_each_node_has_a_gpu_of_its_own(
    gpus: int, demanded: bool, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("bench_parallel_swap")
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert len(module.on_gpus(tuple(module.PUBLISHED), demanded=demanded)) == count
    assert ("needs a GPU of its own" in capsys.readouterr().out) == (gpus < 4)
