"""Traces of production services as workloads, and a CSV of our own. Errors name the file and the line."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from computron.simulation.arrivals import popularity
from computron.simulation.workload import Arrival, Workload

DAY = 86_400.0
COLUMNS = Arrival._fields
NEEDED = ("time", "model")
HEADERS = {
    "csv": NEEDED,
    "gentd26": ("gmt_create", "exec_time_seconds", "checkpoint_model_version_id"),
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
}
LATEST = 1e11  # seconds since 1970 are less for a thousand years

Row = dict[str, str]
T = TypeVar("T")


class Lines:
    """The rows of a CSV file with a header. Raises OSError, or ValueError that begins with `path:line:`."""

    def __init__(self, path: Path, needed: Iterable[str]) -> None:
        self._path = path
        self._line = 1
        self._needed = tuple(needed)

    def __iter__(self) -> Iterator[Row]:
        with self._path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            try:
                self._check_header(reader.fieldnames or ())
                for row in reader:
                    self._line = reader.line_num
                    if "" in row:
                        raise self.error("more values than columns")
                    yield row
            except csv.Error as error:
                raise self.error(f"no CSV: {error}") from error
            except UnicodeDecodeError as error:
                raise self.error(f"not UTF-8 text: {error.reason}") from error

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self._path}:{self._line}: {message}")

    def value(self, row: Row, column: str, kind: Callable[[str], T], what: str) -> T:
        try:
            return kind(row[column])
        except ValueError as error:
            raise self.error(f'{column} must be {what}, not "{row[column]}"') from error

    def _check_header(self, columns: Sequence[str]) -> None:
        missing = [name for name in self._needed if name not in columns]
        if missing:
            known = ", ".join(columns) or "none"
            kinds = [kind for kind, header in HEADERS.items() if set(header) <= set(columns)]
            hint = f"; it looks like --trace-format {kinds[0]}" if kinds else ""
            raise self.error(f"no column {', '.join(missing)} (there are: {known}){hint}")


def read_gentd26(path: Path) -> Workload:
    """GenTD26, image generation with many fine-tuned checkpoints (Lin et al., SoCC 2025), `gentd26_requests.csv`.

    A request counts if it has an execution time: those that failed after computing do, those that still waited when
    the trace was taken (time 0, no model) do not. `seconds` is its execution time; the first request is at 0.
    """
    lines = Lines(path, HEADERS["gentd26"])
    arrivals = []
    for row in lines:
        seconds = lines.value(row, "exec_time_seconds", _number_or_nothing, "a number of seconds")
        if not seconds:
            continue
        model = row["checkpoint_model_version_id"]
        if not model:
            raise lines.error("a request with an execution time, but without a model")
        time = lines.value(row, "gmt_create", _timestamp, "a time like 2024-11-15 16:57:50")
        arrivals.append(Arrival(time, model, seconds=seconds))
    return _workload("gentd26", path, arrivals)


def read_azure(path: Path, models: Sequence[str], *, zipf: float = 0.0, seed: int = 0) -> Workload:
    """Azure LLM inference 2023 (Patel et al., ISCA 2024): real arrivals and lengths of one service, without models.

    Each request goes to one of `models`, drawn with Zipf popularity of this exponent (0: all alike), the first most.
    """
    lines = Lines(path, HEADERS["azure"])
    times, prompts, outputs = [], [], []
    for row in lines:
        times.append(lines.value(row, "TIMESTAMP", _timestamp, "a time like 2023-11-16 18:15:46.68"))
        prompts.append(lines.value(row, "ContextTokens", _tokens, "a whole number from 1"))
        outputs.append(lines.value(row, "GeneratedTokens", _tokens, "a whole number from 1"))
    which = np.random.default_rng(seed).choice(len(models), len(times), p=popularity(len(models), zipf))
    names = (models[place] for place in which.tolist())
    workload = _workload("azure", path, list(map(Arrival, times, names, prompts, outputs)))
    settings = {**workload.settings, "zipf": zipf, "seed": seed}
    return replace(workload, models=tuple(models), settings=settings)


def read_csv(path: Path) -> Workload:
    """Columns as the fields of `Arrival`; only `time` and `model` are needed, and an empty value is the default.

    Times are seconds from any origin, in any order: the first request is taken as 0. `seconds` and `deadline` are
    seconds, and `deadline` counts from the request's time.
    """
    lines = Lines(path, NEEDED)
    arrivals = []
    for row in lines:
        unknown = [name for name in row if name not in COLUMNS]
        if unknown:
            raise lines.error(f"unknown column {', '.join(unknown)}; known: {', '.join(COLUMNS)}")
        if not row["model"]:
            raise lines.error("a request without a model")
        time = lines.value(row, "time", _number, "a number of seconds")
        if abs(time) > LATEST:
            raise lines.error(f"time must be in seconds, and {row['time']} looks like milliseconds: divide it by 1000")
        arrivals.append(
            Arrival(
                time,
                row["model"],
                _given(lines, row, "prompt_tokens", _tokens, "a whole number from 1", 1),
                _given(lines, row, "output_tokens", _tokens, "a whole number from 1", 1),
                _given(lines, row, "seconds", _span, "a number of seconds, at least 0", None),
                _given(lines, row, "priority", int, "a whole number", 0),
                _given(lines, row, "deadline", _span, "a number of seconds, at least 0", None),
            )
        )
    return _workload("csv", path, arrivals)


def read_lengths(path: Path, column: Literal["prompt_tokens", "output_tokens"]) -> tuple[int, ...]:
    """The lengths in a trace of Azure's or in a CSV of ours, whichever it is by its header."""
    lines = Lines(path, ())
    azure = {"prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}[column]
    lengths = []
    for row in lines:
        name = azure if azure in row else column
        if name not in row:
            raise lines.error(f"no column {column} or {azure}")
        lengths.append(lines.value(row, name, _tokens, "a whole number from 1"))
    if not lengths:
        raise ValueError(f"{path}: no lengths in it")
    return tuple(lengths)


def denser(workload: Workload, load: float) -> Workload:
    """The same requests, `load` times as many a second: arrivals divided by it, execution times as they are."""
    if not 0 < load < math.inf:
        raise ValueError(f"the load must be more than 0, not {load:g}")
    arrivals = (a._replace(time=a.time / load) for a in workload.arrivals)
    return replace(workload, arrivals=tuple(arrivals), settings={**workload.settings, "load": load})


def speed_up(workload: Workload, factor: float) -> Workload:
    """Arrivals and execution times divided by `factor`: the same load of a quicker service. Deadlines stay."""
    if not 0 < factor < math.inf:
        raise ValueError(f"the speed-up must be more than 0, not {factor:g}")
    arrivals = (
        a._replace(time=a.time / factor, seconds=None if a.seconds is None else a.seconds / factor)
        for a in workload.arrivals
    )
    settings = {**workload.settings, "speed_up": factor}
    return replace(workload, arrivals=tuple(arrivals), settings=settings)


def overlay(workload: Workload, copies: int) -> Workload:
    """`copies` times as many requests in the same days: days of the trace are laid over each other.

    Of D days (24 hours each, counted from the first request, the last one filled up), copy k of the whole trace is
    moved by k * D // copies days, and what passes the end comes in again at the beginning. A move by whole days
    keeps every request at its time of day, so that busy hours meet busy hours, as they would if the service had
    more users; and it keeps each day's bursts whole. Different days meet, so that no burst is simply repeated. The
    models stay the same. Must come before `speed_up`.

    Raises ValueError if there are fewer days than copies, since then two copies would be the same.
    """
    days = int(workload.arrivals[-1].time // DAY) + 1 if workload.arrivals else 0
    if copies < 1 or copies > max(days, 1):
        raise ValueError(f"{copies} copies cannot be overlaid: the trace has {days} days, and each copy needs its own")
    period = days * DAY
    shifts = [copy * days // copies * DAY for copy in range(copies)]
    moved = (a._replace(time=(a.time + shift) % period) for shift in shifts for a in workload.arrivals)
    arrivals = tuple(sorted(moved, key=_time)) if copies > 1 else workload.arrivals
    return replace(workload, arrivals=arrivals, settings={**workload.settings, "overlay": copies})


def _workload(name: str, path: Path, arrivals: list[Arrival]) -> Workload:
    """In order of time, the first at 0; requests of one instant keep their order."""
    if not arrivals:
        raise ValueError(f"{path}: no request in it")
    arrivals.sort(key=_time)
    first = arrivals[0].time
    models = dict.fromkeys(a.model for a in arrivals)
    moved = tuple(a._replace(time=a.time - first) for a in arrivals)
    return Workload(name, tuple(models), moved, {"trace": path.name})


def _time(arrival: Arrival) -> float:
    return arrival.time


def _given(lines: Lines, row: Row, column: str, kind: Callable[[str], T], what: str, default: T) -> T:
    return lines.value(row, column, kind, what) if row.get(column) else default


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _number_or_nothing(text: str) -> float:
    return _span(text) if text else 0.0


def _span(text: str) -> float:
    number = _number(text)
    if number < 0:
        raise ValueError
    return number


def _tokens(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _timestamp(text: str) -> float:
    """Seconds since 1970, as if the time were UTC: only differences count, and no trace tells its zone."""
    return (datetime.fromisoformat(text) - _EPOCH).total_seconds()


_EPOCH = datetime(1970, 1, 1)
