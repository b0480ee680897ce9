"""The picture of an evaluation: replies in the format, and right answers by category, with their intervals.

matplotlib comes with an extra and is imported for a picture only; no display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lema.errors import ConfigError
from lema.libraries import how_to_install

from .evaluate import Evaluation
from .score import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 0.8


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise a `ConfigError` where a picture could not be drawn to a file, before there is one."""
    try:
        import matplotlib.figure  # noqa: F401
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError(
            f"a plot needs matplotlib, which cannot be imported ({error}): {how_to_install('matplotlib')}"
        ) from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = os.path.splitext(path)[1].removeprefix(".").lower()
    if kind and kind not in kinds:
        raise ConfigError(f"{os.fspath(path)!r} cannot be a plot: its ending is none of {', '.join(sorted(kinds))}")


def plot(evaluation: Evaluation, path: str | os.PathLike[str], title: str = "") -> None:
    """Write the picture; the file's ending says which kind (png, svg, pdf).

    Raises:
        ConfigError: matplotlib is missing, or does not know the kind.
    """
    check_plot(path)
    _figure(evaluation, title).savefig(path, dpi=120)


def _figure(evaluation: Evaluation, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    form, content = figure.subplots(1, 2, width_ratios=(1, 3), sharey=True)
    figure.suptitle(title)
    colours = {score.name: f"C{i}" for i, score in enumerate(evaluation.scores)}
    strict = {score.name: [score.strict] for score in evaluation.scores if score.in_format}
    _bars(form, ["all"], strict, colours)
    form.set_title("replies in the format")
    form.set_ylabel("share, with 95% interval")
    categories = list(evaluation.scores[0].by_category)
    right = {score.name: [score.right, *score.by_category.values()] for score in evaluation.scores}
    _bars(content, ["all", *categories], right, colours)
    content.set_title("right answers")
    content.legend(fontsize="small")
    form.set_ylim(0, 1.02)
    return figure


def _bars(axes: Any, labels: Sequence[str], shares: dict[str, list[Share]], colours: dict[str, str]) -> None:
    wide = _WIDTH / max(len(shares), 1)
    for number, (name, values) in enumerate(shares.items()):
        places = [i + (number - (len(shares) - 1) / 2) * wide for i in range(len(labels))]
        heights = [share.value if share.of else 0.0 for share in values]
        below = [height - share.interval[0] if share.of else 0.0 for height, share in zip(heights, values)]
        above = [share.interval[1] - height if share.of else 0.0 for height, share in zip(heights, values)]
        axes.bar(places, heights, wide, label=name, color=colours[name])
        # rounding may put an end of the interval on the wrong side of the share
        errors = [[max(0.0, length) for length in ends] for ends in (below, above)]
        axes.errorbar(places, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_xticks(range(len(labels)), labels)
