"""Tables of results: systems beside each other, and the models of one system."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from computron.simulation.experiment import Sweep
from computron.simulation.results import Distribution, Summary

NONE = "-"
_DECIMAL = 1000
_NARROWEST = 8


def comparison(summaries: Mapping[str, Summary]) -> Table:
    """A column for each system, a row for each measure."""
    table = _table()
    table.add_column("")
    for system in summaries:
        table.add_column(system, justify="right", min_width=_NARROWEST)
    found = list(summaries.values())
    for name, show in _MEASURES.items():
        table.add_row(name, *map(show, found))
    for target in dict.fromkeys(target for summary in found for target in summary.attainment):
        table.add_row(f"in time ({target})", *(percent(summary.attainment.get(target)) for summary in found))
    for reason in dict.fromkeys(reason for summary in found for reason in summary.rejected):
        table.add_row(f"rejected: {reason}", *(str(summary.rejected.get(reason, 0)) for summary in found))
    return table


def per_model(summary: Summary) -> Table:
    """A row for each model, in the order of the workload."""
    table = _table()
    table.add_column("model", overflow="fold")
    for name in ("requests", "rejected", "mean", "p50", "p99", "first p50", "first p99", "swaps", "moved"):
        table.add_column(name, justify="right")
    for name, model in summary.models.items():
        table.add_row(
            Text(name),
            str(model.requests),
            str(model.rejected),
            *(_of(model.latency, part) for part in ("mean", "p50", "p99")),
            *(_of(model.first_token, part) for part in ("p50", "p99")),
            str(model.swaps),
            size(model.bytes),
        )
    return table


def swept(against: str, found: Sweep, target: str) -> Table:
    """A column for each system, a row for each load or number of groups."""
    table = _table()
    table.add_column(against, justify="right")
    for system in found:
        table.add_column(system, justify="right", min_width=_NARROWEST)
    for points in zip(*found.values(), strict=True):
        table.add_row(f"{points[0].at:g}", *(percent(point.attainment[target]) for point in points))
    return table


def overload(system: str, summary: Summary, asked: float) -> str:
    """One line. asked: requests a second."""
    device, link = summary.device_utilisation, max(summary.link_utilisation, summary.link_back_utilisation)
    remedy = "more memory or a quicker link" if link > device else "quicker steps or larger batches"
    return (
        f"{system}: overloaded: {summary.throughput:.4g} of {asked:.4g} requests a second answered, device "
        f"{percent(device)} busy, link {percent(link)}: more groups, {remedy}, or fewer requests would help"
    )


def _table() -> Table:
    return Table(header_style="bold", box=None, pad_edge=False)


def seconds(value: float | None) -> str:
    """Three digits, in the unit that suits: 12.3 ms, 1.23 s."""
    if value is None:
        return NONE
    if value >= 1 or value == 0:
        return f"{value:.3g} s" if value < _DECIMAL else f"{value:.0f} s"
    milliseconds = value * 1e3
    return f"{milliseconds:.3g} ms" if milliseconds < _DECIMAL - 0.5 else "1 s"


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < _DECIMAL:
            return f"{value:.3g} {unit}"
        value /= _DECIMAL
    return f"{value:.3g} TB" if value < _DECIMAL else f"{value:.0f} TB"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def _of(distribution: Distribution | None, part: str) -> str:
    return seconds(None if distribution is None else getattr(distribution, part))


def _row(distribution: str, part: str) -> Callable[[Summary], str]:
    return lambda summary: _of(getattr(summary, distribution), part)


_MEASURES: dict[str, Callable[[Summary], str]] = {
    "requests": lambda s: str(s.requests),
    "finished": lambda s: str(s.finished),
    "requests a second": lambda s: f"{s.throughput:.4g}",
    **{f"latency {part}": _row("latency", part) for part in ("mean", "p50", "p90", "p95", "p99", "max")},
    **{f"first token {part}": _row("first_token", part) for part in ("mean", "p50", "p99")},
    "longest wait": lambda s: seconds(s.longest_wait),
    "fairness": lambda s: NONE if s.fairness is None else f"{s.fairness:.3f}",
    "swaps": lambda s: str(s.swaps),
    "swaps a request": lambda s: f"{s.swaps_per_request:.3g}",
    "moved a request": lambda s: size(s.bytes_per_request),
    "swap time hidden": lambda s: percent(s.hidden_swap_share),
    "device busy": lambda s: percent(s.device_utilisation),
    "link busy": lambda s: percent(s.link_utilisation),
    "link back busy": lambda s: percent(s.link_back_utilisation),
    "requests a step": lambda s: f"{s.mean_batch:.3g}",
}
