"""What the benchmarks share: flags, one table, the JSON file, the picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def arguments(
    description: str,
    extend: Callable[[argparse.ArgumentParser], Any] | None = None,
    argv: list[str] | None = None,
) -> argparse.Namespace:
    """`quick`, `json`, `plot`, `device` ("auto", "host" or "cuda"), `seed`, and what `extend` adds to the parser."""
    parser = argparse.ArgumentParser(
        description=description.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute, with coarser figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of objects")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (needs matplotlib)")
    parser.add_argument("--device", choices=("auto", "host", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--seed", type=int, default=0, help="of random data and arrivals; default: 0")
    if extend is not None:
        extend(parser)
    return parser.parse_args(argv)


def uses_cuda(options: argparse.Namespace) -> bool:
    """Whether to measure a CUDA device. Exits with the reason if one is demanded and there is none."""
    from computron import _transfer

    if options.device == "host":
        return False
    reason = _transfer.cuda_unavailable_reason()
    if reason is not None and options.device == "cuda":
        raise SystemExit(f"no CUDA device can be used: {reason}")
    return reason is None


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None


class Report:
    """Rows of one benchmark. `ratio` is what the row is judged by; `baseline` is measured in the same run."""

    def __init__(self, title: str, options: argparse.Namespace, names: Sequence[str]) -> None:
        """`names`: the rows that this run promises, whatever else it adds."""
        self.title = title
        self.names = tuple(names)
        self.rows: list[Row] = []
        self._options = options
        self._draw: Callable[[Axes], None] | None = None

    def row(
        self, name: str, value: float, unit: str, baseline: float | None = None, ratio: float | None = None
    ) -> None:
        self.rows.append(Row(name, value, unit, baseline, ratio))

    def plot(self, draw: Callable[[Axes], None]) -> None:
        """`draw` is called by `finish` if a picture is wanted."""
        self._draw = draw

    def finish(self) -> None:
        """Print the table; write the JSON file and the picture if they were asked for.

        Raises RuntimeError, after the table and before any file is written, if a promised row is missing.
        """
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        table = Table(title=f"{self.title} ({machine})", title_justify="left")
        table.add_column("name")
        for column in ("value", "unit", "baseline", "ratio"):
            table.add_column(column, justify="left" if column == "unit" else "right")
        for row in self.rows:
            table.add_row(row.name, _figure(row.value), row.unit, _figure(row.baseline), _figure(row.ratio))
        Console(width=None if os.environ.get("COLUMNS") else 120).print(table)
        missing = sorted(set(self.names) - {row.name for row in self.rows})
        if missing:
            raise RuntimeError(f"this benchmark promises rows that it did not give: {', '.join(missing)}")
        if self._options.json is not None:
            self._options.json.write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")
        if self._options.plot is None:
            return
        if self._draw is None:
            print(f"{self._options.plot} was not written: this benchmark has nothing to draw")
        else:
            self._write_plot(self._options.plot, self._draw)

    def _write_plot(self, path: Path, draw: Callable[[Axes], None]) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.set_title(self.title)
        draw(axes)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
