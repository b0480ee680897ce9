"""The plot of a report, drawn without a display where matplotlib is installed.

It knows series of points; it knows nothing of runs or arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING = "No plot: matplotlib is not installed here (`pip install 'matplotlib>=3.8'`)."
_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One pair of axes: bars where positions are words, lines where they are numbers."""

    title: str
    x: str
    y: str
    series: Mapping[str, Mapping[Any, float | None]]
    """Values by position, for every name in the legend."""
    levels: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines, as limits."""
    logarithmic: bool = False
    """Whether positions lie far apart; each is then marked."""


def draw(panels: Sequence[Panel], path: Path, title: str) -> str | None:
    """Write the PNG; why there is none, or None."""
    try:
        import matplotlib
    except ImportError:
        return MISSING
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4.0 * rows), squeeze=False)
    figure.suptitle(title)
    for axes, panel in zip(grid.flat, panels):
        _fill(axes, panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def _fill(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    positions = list(dict.fromkeys(position for points in panel.series.values() for position in points))
    if all(isinstance(position, int | float) for position in positions):
        _lines(axes, panel)
    else:
        _bars(axes, panel, positions)
    for number, (name, level) in enumerate(panel.levels.items()):
        axes.axhline(level, linestyle="--", linewidth=1, color=f"C{number + 7}", label=name)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if panel.levels or len(panel.series) > 1:
        axes.legend(fontsize=7)


def _lines(axes: Any, panel: Panel) -> None:
    for name, points in panel.series.items():
        known = {x: y for x, y in sorted(points.items()) if y is not None}
        axes.plot(list(known), list(known.values()), marker="o", markersize=4, label=name)
    if panel.logarithmic:
        axes.set_xscale("log", base=2)
        places = sorted({x for points in panel.series.values() for x in points})
        axes.set_xticks(places, [str(place) for place in places])


def _bars(axes: Any, panel: Panel, positions: Sequence[str]) -> None:
    width = 0.8 / max(len(panel.series), 1)
    for number, (name, points) in enumerate(panel.series.items()):
        at = [place + (number + 0.5) * width - 0.4 for place in range(len(positions))]
        axes.bar(at, [points.get(position) or 0.0 for position in positions], width, label=name)
    axes.set_xticks(range(len(positions)), positions, rotation=30, ha="right", fontsize=7)
