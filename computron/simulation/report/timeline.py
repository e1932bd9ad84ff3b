"""Swaps and runs of every node as one HTML page that zooms and needs nothing else: no network, no other file."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from computron.scheduling.actions import Urgency
from computron.simulation.log import Log, StepRow, SwapRow

MOST_BARS = 200_000
KINDS = ("run", "swap-in on demand", "swap-in ahead", "swap-in, cancelled")
_RUN, _DEMAND, _AHEAD, _CANCELLED = range(len(KINDS))
_MICROSECOND = 6  # digits of times in the page


@dataclass(frozen=True, slots=True)
class Bar:
    """`strength`: what part of the time it did what it is there for; a run that waits for pages computes less.

    note: what else there is to say of it.
    """

    begin: float
    end: float
    model: str
    kind: int
    strength: float
    note: str


@dataclass(frozen=True, slots=True)
class Lane:
    """Bars that do not overlap, in order."""

    name: str
    bars: tuple[Bar, ...]


def write_timeline(logs: Mapping[str, Log], path: Path, title: str) -> None:
    """logs: of each system, on one axis of time. Above MOST_BARS bars the page ends early, and says so."""
    path.write_text(page(logs, title), encoding="utf-8")


def page(logs: Mapping[str, Log], title: str) -> str:
    until = _until(logs.values())
    shown = [lane for system, log in logs.items() for lane in lanes(log, system, until)]
    ended = max((log.ended for log in logs.values()), default=0.0)
    models = sorted({bar.model for lane in shown for bar in lane.bars}, key=_in_order)
    numbers = {model: number for number, model in enumerate(models)}
    data = {
        "title": title,
        "ended": ended,
        "until": min(until, ended),
        "models": models,
        "kinds": KINDS,
        "lanes": [_columns(lane, numbers) for lane in shown],
    }
    # In a script element only "<" could end it or open a comment.
    text = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("timeline.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", text)


def lanes(log: Log, system: str, until: float = float("inf")) -> list[Lane]:
    """Of every group, its runs and its swaps that begin by `until`; more lanes where some overlap."""
    found = []
    for group in range(log.groups):
        name = f"{system}, group {group}" if log.groups > 1 else system
        runs = (_run(row) for row in log.steps if row.group == group and row.started <= until)
        swaps = (_swap(row) for row in log.swaps if row.group == group and row.ended - row.busy <= until)
        for what, beside, all_bars in (("runs", "at once", runs), ("swaps", "overtaken", swaps)):
            for row, bars in enumerate(_apart(all_bars)):
                found.append(Lane(f"{name}: {what}{_which(row, beside)}", bars))
    return found


def _which(row: int, beside: str) -> str:
    """What is said of a further row: its bars lie at the time of others."""
    return "" if row == 0 else f" ({beside})" if row == 1 else f" ({beside}, {row})"


def _in_order(name: str) -> list[tuple[str, int]]:
    """As a reader has names in order: model-2 before model-10."""
    parts = [*re.split(r"(\d+)", name), "0"]
    return [(text, int(number)) for text, number in zip(parts[::2], parts[1::2], strict=True)]


def _run(row: StepRow) -> Bar:
    length = row.ended - row.started
    strength = min(row.compute / length, 1.0) if length else 1.0
    requests = "1 request" if row.requests == 1 else f"{row.requests} requests"
    return Bar(row.started, row.ended, row.model, _RUN, strength, f"{requests}, {row.compute * 1e3:.3g} ms of compute")


def _swap(row: SwapRow) -> Bar:
    kind = _CANCELLED if row.cancelled else _DEMAND if row.urgency == Urgency.DEMAND else _AHEAD
    waited = max(row.ended - row.busy - row.ordered, 0.0)
    pages = "1 page" if row.frames == 1 else f"{row.frames} pages"
    note = f"{pages}, ordered {waited * 1e3:.3g} ms before it had the link"
    return Bar(row.ended - row.busy, row.ended, row.model, kind, 1.0, note)


def _apart(bars: Iterable[Bar]) -> list[tuple[Bar, ...]]:
    """As few rows as possible, none with two bars at one time; at least one row."""
    rows: list[list[Bar]] = [[]]
    free = [(float("-inf"), 0)]  # when each row ends
    for bar in sorted(bars, key=lambda bar: bar.begin):
        if free[0][0] <= bar.begin:
            row = heapq.heappop(free)[1]
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(bar)
        heapq.heappush(free, (bar.end, row))
    return [tuple(row) for row in rows]


def _until(logs: Iterable[Log]) -> float:
    """The time before which MOST_BARS bars begin."""
    begins = [row.started for log in logs for row in log.steps]
    begins += [row.ended - row.busy for log in logs for row in log.swaps]
    return sorted(begins)[MOST_BARS - 1] if len(begins) > MOST_BARS else float("inf")


def _columns(lane: Lane, numbers: Mapping[str, int]) -> dict[str, object]:
    bars: Sequence[Bar] = lane.bars
    return {
        "name": lane.name,
        "begin": [round(bar.begin, _MICROSECOND) for bar in bars],
        "end": [round(bar.end, _MICROSECOND) for bar in bars],
        "model": [numbers[bar.model] for bar in bars],
        "kind": [bar.kind for bar in bars],
        "strength": [round(bar.strength, 2) for bar in bars],
        "note": [bar.note for bar in bars],
    }
