"""Pictures of results. Needs matplotlib: `pip install 'computron[plot]'`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from computron.simulation.results import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]
Curve = Sequence[tuple[float, float]]

_SIZE = (8.0, 4.4)  # inches, of one picture
_FONT = 9  # points, of titles
_DPI = 150
_CDF_POINTS = 2_000
_GOOD = 0.99  # has a line
_SHARES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)  # have a mark
_NEAR_ALL = 1e-4  # misses below this are hardly told apart


def latency_cdfs(latencies: Mapping[str, Floats], about: str = "") -> Draw:
    """latencies: of each system, in ascending order. about: what was simulated, for the title."""

    def draw(axes: Axes) -> None:
        for system, ordered in latencies.items():
            if not len(ordered):
                continue
            places = np.unique(np.linspace(0, len(ordered) - 1, _CDF_POINTS).astype(np.int64))
            axes.step(ordered[places], (places + 1) / len(ordered), where="post", label=system)
        axes.set(xscale="log", xlabel="latency, s", ylabel="share of requests", ylim=(0, 1.01))
        axes.set_title(_title("Latency", about), fontsize=_FONT)

    return draw


def attainment(curves: Mapping[str, Curve], against: str, target: str, about: str = "") -> Draw:
    """curves: of each system, (load or number of groups, share of requests in time). Half as many misses are as far up
    wherever they are, so that 99 % and 99.9 % can be told apart.
    """

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_yscale("function", functions=(_spread, _gathered))
        axes.set_ylim(0, 1)
        axes.set_yticks(_SHARES, [f"{share * 100:g}" for share in _SHARES])
        axes.axhline(_GOOD, color="black", linewidth=0.8, linestyle=":")
        for system, curve in curves.items():
            places, shares = [x for x, _ in curve], [share for _, share in curve]
            axes.plot(places, shares, marker="o", markersize=4, label=system, clip_on=False)
        if all(x == int(x) for curve in curves.values() for x, _ in curve):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=against, ylabel=f"share within {target}, %")
        axes.set_title(_title(f"In time against {against}", about), fontsize=_FONT)

    return draw


def _spread(share: Floats) -> Floats:
    return -np.log10(np.maximum(1.0 + _NEAR_ALL - share, _NEAR_ALL**2))


def _gathered(place: Floats) -> Floats:
    return 1.0 + _NEAR_ALL - 10.0**-place


def _title(what: str, about: str) -> str:
    return f"{what}\n{about}" if about else what


def check(path: Path) -> None:
    """Raises ValueError if `write` could not write there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'computron[plot]'")
    if _is_folder(path):
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"{path}: pictures can be {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")


def write(pictures: Mapping[str, Draw], path: Path) -> list[Path]:
    """All side by side in the file `path`, or each in a file `NAME.png` of the folder `path`: if it is one, or has no
    suffix. Returns what was written.
    """
    import matplotlib

    matplotlib.use("Agg")
    if _is_folder(path):
        path.mkdir(parents=True, exist_ok=True)
        return [_write([draw], path / f"{name}.png") for name, draw in pictures.items()]
    return [_write(list(pictures.values()), path)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() or not path.suffix


def _write(draws: Sequence[Draw], path: Path) -> Path:
    from matplotlib import pyplot

    width, height = _SIZE
    figure, axes = pyplot.subplots(
        1, len(draws), figsize=(width * len(draws), height), layout="constrained", squeeze=False
    )
    try:
        for draw, place in zip(draws, axes[0], strict=True):
            draw(place)
            place.grid(alpha=0.3)
            if place.get_legend_handles_labels()[0]:
                place.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the curves
        figure.savefig(path, dpi=_DPI)
    finally:
        pyplot.close(figure)
    return path
