from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from computron.simulation.traces import DAY, overlay, read_azure, read_csv, read_gentd26, speed_up
from computron.simulation.workload import Arrival, Workload

GENTD26 = "gmt_create,predict_type,predict_status,exec_time_seconds,checkpoint_model_version_id\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "trace.csv"
        path.write_text(text)
        return path

    return write


def days(*times: float) -> Workload:
    return Workload("days", ("a",), tuple(Arrival(time * DAY, "a", seconds=10.0) for time in times))


def test_gentd26_keeps_what_was_executed_failed_or_not(write):
    path = write(
        GENTD26
        + "2024-11-15 23:59:50,TXT_2_IMG,SUCCEED,32.0,M0\n"
        + "2024-11-16 00:00:20,TXT_2_IMG,FAILED,3.0,M1\n"
        + "2024-11-16 00:00:21,TXT_2_IMG,PENDING,0.0,\n"
        + "2024-11-16 00:00:22,TXT_2_IMG,PENDING,,\n"
        + "2024-11-16 00:00:10,TXT_2_IMG,SUCCEED,4.0,M0\n"
    )
    workload = read_gentd26(path)
    assert [(a.time, a.model, a.seconds) for a in workload.arrivals] == [
        (0.0, "M0", 32.0), (20.0, "M0", 4.0), (30.0, "M1", 3.0),
    ]  # fmt: skip
    assert workload.models == ("M0", "M1")
    assert workload.settings == {"trace": "trace.csv"}


def test_azure_keeps_times_and_lengths_and_spreads_requests_over_models(write):
    rows = "".join(f"2023-11-16 18:15:{n % 60:02}.6805900,{n + 1},{n + 2}\n" for n in range(60))
    path = write(AZURE + rows)
    workload = read_azure(path, ["a", "b", "c"], zipf=1.0, seed=3)
    assert workload.arrivals[1].time == pytest.approx(1.0)
    assert [(a.prompt_tokens, a.output_tokens) for a in workload.arrivals] == [(n + 1, n + 2) for n in range(60)]
    counts = Counter(a.model for a in workload.arrivals)
    assert counts["a"] > counts["b"] > counts["c"] > 0
    assert read_azure(path, ["a", "b", "c"], zipf=1.0, seed=3) == workload
    assert read_azure(path, ["a", "b", "c"], zipf=1.0, seed=4).arrivals != workload.arrivals
    assert workload.models == ("a", "b", "c")


def test_every_column_of_our_own_csv_is_read(write):
    path = write(
        "time,model,prompt_tokens,output_tokens,seconds,priority,deadline\n"
        '0.0,"with,comma ""and"" quotes",5,7,0.30000000000000004,-2,1.5\n'
        "0.3333333333333333,b,,,,,\n"
        "0.3333333333333333,a,,,0.0,,\n"
    )
    workload = read_csv(path)
    assert workload.arrivals == (
        Arrival(0.0, 'with,comma "and" quotes', 5, 7, 0.1 + 0.2, -2, 1.5),
        Arrival(1 / 3, "b"),
        Arrival(1 / 3, "a", seconds=0.0),
    )
    assert workload.models == ('with,comma "and" quotes', "b", "a")


def test_a_log_needs_only_times_and_models_and_may_be_in_any_order(write):
    path = write("\N{ZERO WIDTH NO-BREAK SPACE}model,time\nb,1700000003\na,1700000001.5\n")
    assert read_csv(path).arrivals == (Arrival(0.0, "a"), Arrival(1.5, "b"))


@pytest.mark.parametrize(
    ("reader", "text", "said"),
    [
        (read_gentd26, "gmt_create,exec_time_seconds\n", r":1: no column checkpoint_model_version_id \(there are: gmt"),
        (read_gentd26, GENTD26 + "2024-11-15 23:59:50,T,S,5,M0\nnoon,T,S,5,M0\n", ":3: gmt_create must be a time"),
        (read_gentd26, GENTD26 + "2024-11-15 23:59:50,T,S,x,M0\n", ':2: exec_time_seconds must be .*, not "x"'),
        (read_gentd26, GENTD26 + "2024-11-15 23:59:50,T,S,5.0,\n", ":2: .* without a model"),
        (read_gentd26, GENTD26, ": no request in it"),
        (lambda path: read_azure(path, ["a"]), AZURE + "2023-11-16 18:15:46,0,5\n", ":2: ContextTokens must be"),
        (read_csv, "TIMESTAMP,ContextTokens,GeneratedTokens\n", r"no column .*; it looks like --trace-format azure"),
        (read_csv, "time,model\n1700000000000,a\n", r":2: time must be in seconds, and 1700000000000 looks like mill"),
        (read_csv, "", r":1: no column time, model \(there are: none\)"),
        (read_csv, "time,model,colour\n1,a,red\n", ":2: unknown column colour; known: time, model, prompt_tokens"),
        (read_csv, "time,model\n1,a\nnan,a\n", ':3: time must be a number of seconds, not "nan"'),
        (read_csv, "time,model\n1,\n", ":2: a request without a model"),
        (read_csv, "time,model\n1,a,7\n", ":2: more values than columns"),
        (read_csv, "time,model,seconds\n1,a,-7\n", ":2: seconds must be"),
        (read_csv, 'time,model\n1,"a\nb"\n2,a\nx,a\n', ":5: time must be"),
    ],
)
def test_errors_name_the_file_and_the_line(write, reader, text, said):
    path = write(text)
    with pytest.raises(ValueError, match=said) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}:")


def test_what_is_no_text_is_told(tmp_path: Path):
    path = tmp_path / "binary"
    path.write_bytes(b"time,model\n\xff\xfe,a\n")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_csv(path)


def test_speed_up_divides_arrivals_and_execution_times():
    workload = Workload("w", ("a",), (Arrival(40.0, "a", seconds=8.0, deadline=3.0), Arrival(80.0, "a", 5, 6)))
    quicker = speed_up(workload, 20)
    assert quicker.arrivals == (Arrival(2.0, "a", seconds=0.4, deadline=3.0), Arrival(4.0, "a", 5, 6))
    assert quicker.settings == {"speed_up": 20}
    with pytest.raises(ValueError, match="more than 0"):
        speed_up(workload, 0)


def test_overlaid_copies_keep_the_time_of_day_and_the_span():
    workload = days(0.0, 0.25, 1.5, 3.75)
    twice = overlay(workload, 2)
    assert [a.time / DAY for a in twice.arrivals] == pytest.approx([0.0, 0.25, 1.5, 1.75, 2.0, 2.25, 3.5, 3.75])
    before, after = (Counter(round(a.time % DAY) for a in w.arrivals) for w in (workload, twice))
    assert after == {time: 2 * count for time, count in before.items()}
    assert twice.settings == {"overlay": 2}


def test_no_two_overlaid_copies_are_the_same():
    three = overlay(days(0.5, 1.5 + 1 / 24, 2.5 + 2 / 24), 3)
    assert [a.time for a in three.arrivals] == sorted(a.time for a in three.arrivals)
    assert len({round(a.time) for a in three.arrivals}) == 9
    assert {int(a.time // DAY) for a in three.arrivals} == {0, 1, 2}


def test_there_are_at_most_as_many_copies_as_days():
    workload = days(0.0, 1.1)
    assert overlay(workload, 1).arrivals == workload.arrivals
    for copies in (0, 3):
        with pytest.raises(ValueError, match="the trace has 2 days"):
            overlay(workload, copies)
