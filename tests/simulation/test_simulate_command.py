from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from computron import cli
from computron.simulation.hardware import Hardware, Link, Profile, SimulatedModel, StepTime
from computron.simulation.systems import SYSTEMS

QUICK = ("--duration", "5s", "--rate", "8", "--models", "3", "--model-size", "1GB", "--memory", "2GB")


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["simulate", *map(str, arguments)])


def row(output: str, name: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.startswith(f"{name}  "))
    return re.split(r"\s{2,}", line.strip())[1:]


def results(tmp_path: Path, *arguments: object) -> dict:
    path = tmp_path / "results.json"
    result = run(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    models = (
        SimulatedModel("chat", 2_000_000, StepTime(0.01), continuous=True),
        SimulatedModel("search", 1_000_000, StepTime(0.002)),
    )
    Profile(Hardware(Link(1e9), 100_000, 25), models).write(path)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("time,model,seconds\n0,chat,0.5\n1,search,0.25\n90000,chat,0.5\n")
    return path


def test_without_anything_said_something_useful_is_simulated():
    result = run()
    assert result.exit_code == 0
    assert "8 models (gamma) on 1 group of 40 GB at 25 GB/s\nneeds 104 GB of host memory a group, " in result.output
    assert row(result.output, "requests") == row(result.output, "finished") != ["0"]
    assert re.search(r"\d+ requests simulated in [\d.]+ s: \d+ a second\n$", result.output)


def test_systems_are_compared_on_the_same_requests_and_a_seed_gives_them_again(tmp_path: Path):
    asked = (*QUICK, "--policy", "default", "--policy", "all-resident", "--seed", 3)
    first, again = results(tmp_path, *asked), results(tmp_path, *asked)
    assert first == again
    assert list(first["systems"]) == ["default", "all-resident"]
    ours, bound = first["systems"].values()
    assert ours["requests"] == bound["requests"] > 10
    assert ours["swaps"] > 0 == bound["swaps"]
    assert results(tmp_path, *QUICK, "--seed", 4)["settings"] != first["settings"]


def test_an_overloaded_system_is_named_with_what_was_too_slow(tmp_path: Path):
    path = tmp_path / "results.json"
    asked = (*QUICK, "--duration", "30s", "--policy", "default", "--policy", "all-resident", "--json", path)
    assert "overloaded" not in run(*QUICK, "--memory", "4GB", "--rate", "2").stdout
    result = run(*asked, "--rate", "40", "--bandwidth", "1GB/s", "--max-wait", "100ms")
    (line,) = (line for line in result.stdout.splitlines() if "overloaded" in line)
    assert line.startswith("default: overloaded: ")
    assert json.loads(path.read_text())["overloaded"] == ["default"]
    devices = run(*QUICK, "--duration", "30s", "--rate", "40", "--step-time", "1s", "--batch", "1", "--memory", "4GB")
    assert "quicker steps or larger batches" in devices.stdout


def test_json_holds_what_is_needed_to_repeat_and_to_plot(tmp_path: Path):
    found = results(tmp_path, *QUICK, "--slo", "500ms", "--slo", "first=2s", "--sweep-load", "2,1")
    assert found["hardware"]["link"]["bandwidth"] == 25e9
    assert [model["name"] for model in found["models"]] == ["model-0", "model-1", "model-2"]
    summary = found["systems"]["default"]
    assert set(summary["attainment"]) == {"0.5s", "first=2s"}
    assert {"p50", "p90", "p95", "p99", "mean", "max"} <= set(summary["models"]["model-0"]["first_token"])
    points = found["against_load"]["default"]
    assert [point["at"] for point in points] == [1.0, 2.0]
    assert points[0]["mean"] == summary["latency"]["mean"]


def test_more_groups_serve_more_in_time(tmp_path: Path):
    found = results(tmp_path, *QUICK, "--cv", "3", "--slo", "100ms", "--sweep-groups", "1,3")
    one, three = (point["attainment"]["0.1s"] for point in found["against_groups"]["default"])
    assert one < three


def test_files_are_written(tmp_path: Path):
    pytest.importorskip("matplotlib")
    page, folder = tmp_path / "swaps.html", tmp_path / "plots"
    result = run(*QUICK, "--sweep-load", "0.5,1", "--plot", folder, "--timeline", page, "--per-model")
    assert result.exit_code == 0
    assert {path.name for path in folder.iterdir()} == {"latency.png", "load.png"}
    assert "default: swaps" in page.read_text()
    assert "in time (2s) against load" in result.output
    assert row(result.output, "model-0")[0].isdigit()


def test_lengths_make_models_generate(tmp_path: Path):
    asked = (*QUICK, "--step-time", "1ms", "--prompt-tokens", "100,50", "--output-tokens", "20")
    found = results(tmp_path, *asked)
    assert all(model["continuous"] for model in found["models"])
    latency, first = (found["systems"]["default"][name]["p50"] for name in ("latency", "first_token"))
    assert latency == pytest.approx(first + 0.019, rel=0.5)
    assert found["settings"]["output_tokens"] == {"tokens": 20}
    slower = results(tmp_path, *asked, "--prompt-token-time", "1ms")
    assert slower["systems"]["default"]["first_token"]["p50"] > first + 0.05


def test_what_costs_nothing_because_it_was_left_out_is_noted(tmp_path: Path):
    asked = (*QUICK, "--step-time", "1ms", "--output-tokens", "5")
    costs = ("--prompt-token-time", "10us", "--request-time", "2ms", "--cache-per-token", "1MB")
    assert run(*asked).stderr == (
        "note: KV caches take no memory: give --cache-per-token; prompts cost nothing: give --prompt-token-time; "
        "a step takes as long for many requests as for one: give --request-time\n"
    )
    assert run(*asked, *costs[:4]).stderr == "note: KV caches take no memory: give --cache-per-token\n"
    assert run(*asked, *costs).stderr == run(*QUICK).stderr == ""
    model = results(tmp_path, *asked, *costs)["models"][0]
    assert model["cache_bytes_per_token"] == 1e6
    assert model["step"] == pytest.approx(
        {"base": 0.001, "per_prompt_token": 1e-5, "per_sequence": 0.002, "per_context_token": 0.0, "opening": 0.0}
    )


def test_a_profile_gives_hardware_and_models(tmp_path: Path, profile: Path):
    found = results(tmp_path, "--profile", profile, "--duration", "5s", "--bandwidth", "2GB/s")
    assert [(model["name"], model["bytes"]) for model in found["models"]] == [("chat", 2e6), ("search", 1e6)]
    assert (found["hardware"]["frames"], found["hardware"]["link"]["bandwidth"]) == (25, 2e9)
    more = results(tmp_path, "--profile", profile, "--models", "3", "--duration", "5s", "--memory", "3MB")
    assert [(m["name"], m["bytes"]) for m in more["models"]] == [("model-0", 2e6), ("model-1", 1e6), ("model-2", 2e6)]
    assert more["hardware"]["frames"] == 30


def test_a_trace_brings_its_requests_and_execution_times(tmp_path: Path, profile: Path, trace: Path):
    asked = ("--profile", profile, "--trace", trace, "--slo", "1x+100ms")
    found = results(tmp_path, *asked)
    assert found["systems"]["default"]["requests"] == 3
    assert found["systems"]["default"]["attainment"] == {"1x+0.1s": 1.0}
    twice = results(tmp_path, *asked, "--overlay", "2", "--speed-up", "10")
    assert twice["systems"]["default"]["requests"] == 6
    assert twice["settings"] == {"trace": "trace.csv", "overlay": 2, "speed_up": 10.0}
    assert twice["systems"]["default"]["models"]["chat"]["latency"]["p50"] == pytest.approx(0.05, rel=0.1)


def test_models_of_a_trace_that_a_profile_does_not_know_are_like_those_it_knows(
    tmp_path: Path, profile: Path, trace: Path
):
    trace.write_text("time,model\n0,x\n1,y\n2,z\n")
    found = results(tmp_path, "--profile", profile, "--trace", trace)
    assert [(m["name"], m["bytes"]) for m in found["models"]] == [("x", 2e6), ("y", 1e6), ("z", 2e6)]
    trace.write_text("time,model\n0,chat\n1,y\n")
    assert "but not y" in run("--profile", profile, "--trace", trace).stderr


def test_a_trace_without_models_is_spread_over_them(tmp_path: Path):
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.1,5,3\n" * 40)
    found = results(tmp_path, *QUICK[4:], "--trace", path, "--trace-format", "azure", "--step-time", "1ms")
    models = found["systems"]["default"]["models"]
    assert sum(model["requests"] for model in models.values()) == 40
    assert models["model-0"]["requests"] > models["model-2"]["requests"] > 0
    drawn = results(tmp_path, *QUICK, "--step-time", "1ms", "--prompt-tokens", path, "--output-tokens", path)
    assert drawn["settings"]["prompt_tokens"] == {"of": 40, "mean": 5.0}
    assert drawn["settings"]["output_tokens"] == {"of": 40, "mean": 3.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--memory", "40"), '--memory: "40" has no unit; write it like "300MiB"'),
        (("--bandwidth", "0GB/s"), '--bandwidth: must be more than nothing, not "0GB/s"'),
        (("--memory", "10GB"), "model model-0 takes 13 GB of a device with 10 GB: raise --memory"),
        (("--frame", "50GB"), "--memory: 40 GB has no room for one page of 50 GB (--frame)"),
        (("--policy", "defualt"), '--policy: "defualt" is not known; did you mean "default"?'),
        (("--router", "x"), '--router: "x" is not known; choose from hash, '),
        (("--slo", "2"), '--slo: "2" has no unit; write it like "30s"; targets are like 2s, first=1s and 2x+2s'),
        (("--slo", "2x+1s"), "--slo: this workload does not tell execution times"),
        (("--sweep-load", "1,a"), '--sweep-load: "1,a" is no list of numbers above 0'),
        (("--sweep-groups", "1.5"), '--sweep-groups: "1.5" is no list of whole numbers above 0'),
        (("--rate", "0"), "--rate must be more than 0"),
        (("--duration", "1us"), "no request comes"),
        (("--prompt-tokens", "many"), '--prompt-tokens: "many" is no number'),
        (("--overlay", "2"), "--overlay needs a --trace"),
        (("--trace", "no.csv"), "no.csv: No such file or directory"),
        (("--trace", "no.csv", "--cv", "2"), "--cv does not go with --trace"),
        (("--trace", "no.csv", "--zipf", "2"), "--zipf does not go with this trace"),
        (("--trace", "no.csv", "--models", "2"), "--models does not go with this trace"),
        (("--trace", "no.csv", "--trace-format", "xls"), '--trace-format: "xls" is not known'),
        (("--profile", "no.json"), "no.json: No such file or directory"),
        (("--json", "no/where.json"), "no/where.json cannot be written: there is no folder no"),
        (("--timeline", "/"), "/ cannot be written: it is a folder"),
        (("--zipf", "-1"), "--zipf must be at least 0, not -1"),
        (("--sweep-load", "1e-12", "--duration", "5s"), "the last request comes after "),
    ],
)
def test_what_cannot_be_is_one_line_with_the_remedy(arguments, said):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1


def test_a_profile_tells_what_its_own_options_would_tell(profile: Path):
    assert "--step-time is for hardware without --profile" in run("--profile", profile, "--step-time", "1s").stderr


def test_a_file_that_is_no_profile_is_told(tmp_path: Path):
    path = tmp_path / "profile.json"
    path.write_text("{}")
    result = run("--profile", path)
    assert (result.exit_code, result.stderr.startswith(f"error: {path}: ")) == (2, True)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        (("hardware",), {"stages": 0}, "stages must be at least 1, not 0"),
        (("hardware",), {"frame_bytes": 0}, "frame_bytes must be at least 1"),
        (("hardware",), {"request_overhead": -1}, "request_overhead must be at least 0 seconds"),
        (("hardware", "link"), {"bandwidth": 0}, "bandwidth must be more than 0"),
        (("hardware", "link"), {"latency": -1}, "latency must be at least 0"),
        (("models", 0), {"max_batch_size": 0}, "max_batch_size of model 'chat' must be at least 1"),
        (("models", 0), {"name": "search"}, "several models have one name"),
        (("models", 0, "step"), {"base": -1}, "base of a step must be at least 0 seconds"),
    ],
)
def test_a_profile_that_cannot_be_is_told(profile: Path, part: tuple, values: dict, said: str):
    content = json.loads(profile.read_text())
    changed = content
    for name in part:
        changed = changed[name]
    changed.update(values)
    profile.write_text(json.dumps(content))
    result = run("--profile", profile)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr


def test_one_request_can_be_simulated_by_every_system(tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text("time,model\n0,chat\n")
    every = [word for system in SYSTEMS for word in ("--policy", system)]
    result = run("--trace", path, *every)
    assert result.exit_code == 0, result.output
    assert row(result.output, "finished") == ["1"] * len(SYSTEMS)


def test_help_tells_every_system_and_gives_examples():
    text = run("--help").output
    assert all(name in text for name in ("default", "all-resident", "--sweep-groups", "computron simulate --models"))
