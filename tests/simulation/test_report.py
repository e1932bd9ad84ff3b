from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from computron.simulation.experiment import Point
from computron.simulation.hardware import Hardware, Link
from computron.simulation.log import Log, StepRow, SwapRow
from computron.simulation.report import plots, table, timeline
from computron.simulation.results import summarise
from computron.simulation.workload import Arrival, Workload

EVIL = '</script><script>alert("x")</script><!-- [bold]'
URGENT, AHEAD = 0, 1


def printed(what) -> str:
    text = StringIO()
    Console(file=text, width=200).print(what)
    return text.getvalue()


def summary_of(model: str = "a", targets=(1.0,), reason: str | None = None):
    log = Log(2)
    for number, finished in enumerate((0.5, 2.0)):
        log.arrived[number], log.started[number] = 0.0, 0.25
        log.first_token[number] = log.finished[number] = finished
    if reason is not None:
        log.rejected[1] = reason
        log.finished[1] = float("nan")
    log.ended = 2.0
    workload = Workload("w", (model,), (Arrival(0.0, model),) * 2)
    return summarise(log, workload, Hardware(Link(1e9), 1, 1), targets=targets)


def rows(text: str) -> dict[str, list[str]]:
    return {line[:20].strip(): re.split(r"\s{2,}", line[20:].strip()) for line in text.splitlines()}


def test_systems_stand_beside_each_other():
    found = rows(printed(table.comparison({"ours": summary_of(), "theirs": summary_of(reason="deadline")})))
    assert found[""] == ["ours", "theirs"]
    assert found["latency mean"] == ["1.25 s", "500 ms"]
    assert found["in time (1s)"] == ["50.0%", "50.0%"]
    assert found["rejected: deadline"] == ["0", "1"]
    assert found["swap time hidden"] == ["-", "-"]


def test_models_are_listed_under_their_names_as_they_are():
    assert EVIL in printed(table.per_model(summary_of(EVIL)))


def test_a_sweep_has_a_row_for_each_value():
    points = [Point(at, {"1s": share}, None, None, 0.0, 0.0) for at, share in ((0.5, 1.0), (2.0, 0.25))]
    lines = printed(table.swept("load", {"ours": points}, "1s")).splitlines()
    assert [line.split() for line in lines] == [["load", "ours"], ["0.5", "100.0%"], ["2", "25.0%"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0 s"), (0.0123456, "12.3 ms"), (0.99999, "1 s"), (1.236, "1.24 s"), (12345.6, "12346 s")],
)
def test_times_have_the_unit_that_suits(value, text):
    assert table.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (13e9, "13 GB"), (2.5e12, "2.5 TB"), (1.5e16, "15000 TB")]
)
def test_sizes_have_the_unit_that_suits(value, text):
    assert table.size(value) == text


def log_with(steps=(), swaps=(), groups=1, ended=10.0) -> Log:
    log = Log(0, groups)
    log.steps, log.swaps, log.ended = list(steps), list(swaps), ended
    return log


def page_data(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_a_timeline_has_lanes_for_runs_and_swaps_of_every_group():
    steps = [StepRow(0, "a", 0.0, 1.0, 0.25, 3), StepRow(1, "b", 0.0, 1.0, 1.0, 1)]
    swaps = [
        SwapRow(0, "b", 0.0, 2.0, 1.5, 7, URGENT, False, True),
        SwapRow(0, "c", 2.0, 3.0, 1.0, 1, AHEAD, False, True),
        SwapRow(0, "a", 4.0, 5.0, 1.0, 0, URGENT, True, False),
    ]
    data = page_data(timeline.page({"lru": log_with(steps, swaps, groups=2)}, "title"))
    lanes = {lane["name"]: lane for lane in data["lanes"]}
    assert list(lanes) == ["lru, group 0: runs", "lru, group 0: swaps", "lru, group 1: runs", "lru, group 1: swaps"]
    assert (lanes["lru, group 0: runs"]["strength"], lanes["lru, group 1: runs"]["strength"]) == ([0.25], [1.0])
    bars = lanes["lru, group 0: swaps"]
    assert (bars["begin"], bars["end"]) == ([0.5, 2.0, 4.0], [2.0, 3.0, 5.0])
    assert [data["models"][n] for n in bars["model"]] == ["b", "c", "a"]
    assert [data["kinds"][n] for n in bars["kind"]] == ["swap-in on demand", "swap-in ahead", "swap-in, cancelled"]
    assert bars["note"][0] == "7 pages, ordered 500 ms before it had the link"


def test_bars_at_one_time_lie_in_different_lanes():
    steps = [StepRow(0, "a", begin, begin + 1.0, 1.0, 1) for begin in (0.0, 0.5, 1.0, 1.5)]
    runs = [lane for lane in timeline.lanes(log_with(steps), "s") if lane.name.startswith("s: runs")]
    assert [lane.name for lane in runs] == ["s: runs", "s: runs (at once)"]
    assert [[bar.begin for bar in lane.bars] for lane in runs] == [[0.0, 1.0], [0.5, 1.5]]


def test_models_of_a_page_are_in_the_order_of_their_names_and_rows_have_different_ones():
    swaps = [SwapRow(0, f"m-{n}", 0.0, 1.0, 1.0, 1, URGENT, False, True) for n in (10, 9, 1)]
    data = page_data(timeline.page({"s": log_with(swaps=swaps)}, "t"))
    assert data["models"] == ["m-1", "m-9", "m-10"]
    assert [lane["name"] for lane in data["lanes"]] == [
        "s: runs",
        "s: swaps",
        "s: swaps (overtaken)",
        "s: swaps (overtaken, 2)",
    ]


def test_a_page_cannot_be_broken_by_names_and_needs_no_other_file():
    page = timeline.page({EVIL: log_with([StepRow(0, EVIL, 0.0, 1.0, 1.0, 1)])}, EVIL)
    data = page_data(page)
    assert (data["title"], data["models"]) == (EVIL, [EVIL])
    assert EVIL not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?:|src=|href=|@import|innerHTML", page)


def test_a_page_with_too_many_bars_ends_early_and_says_so(monkeypatch):
    monkeypatch.setattr(timeline, "MOST_BARS", 3)
    steps = [StepRow(0, "a", float(n), n + 0.5, 0.5, 1) for n in range(5)]
    data = page_data(timeline.page({"s": log_with(steps)}, "t"))
    assert (data["lanes"][0]["begin"], data["until"], data["ended"]) == ([0.0, 1.0, 2.0], 2.0, 10.0)


def test_pictures_go_into_one_file_or_a_folder(tmp_path: Path):
    pytest.importorskip("matplotlib")
    pictures = {
        "latency": plots.latency_cdfs({"a": np.array([0.1, 0.2, 3.0]), "nothing": np.empty(0)}),
        "load": plots.attainment({"a": [(0.5, 1.0), (1.0, 0.5)]}, "load", "2s"),
    }
    folder = tmp_path / "new"
    assert plots.write(pictures, folder) == [folder / "latency.png", folder / "load.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert plots.write(pictures, tmp_path / "one.svg") == [tmp_path / "one.svg"]
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_what_cannot_be_drawn_is_told_before_anything_runs(tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match=r"pictures can be .*png"):
        plots.check(tmp_path / "x.doc")
    with pytest.raises(ValueError, match="there is no folder"):
        plots.check(tmp_path / "nowhere" / "x.png")
    plots.check(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need matplotlib"):
        plots.check(tmp_path)
