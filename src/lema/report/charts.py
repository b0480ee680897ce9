"""Curves of a run as shapes in a box of 1000 by 1000, with numbers beside their axes.

Which curves a run has, and their geometry; reading before and HTML after are others' work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .run_folder import Run
from .series import Point, log_ticks, number_text, smoothed, thinned, ticks

BOX = 1000.0
_SMOOTH_FROM = 30
_LOG_FROM = 20.0
"""Times the median that the highest value is where a scale becomes logarithmic, if it may."""
_MARKS = 200


@dataclass
class Series:
    """A line, or dots, of one chart."""

    name: str
    style: str
    """raw, line, dots, line second, …: classes of the style sheet."""
    points: list[Point]
    path: str = ""


@dataclass
class Chart:
    """A chart ready to draw; positions are in percent of the plot's box."""

    key: str
    title: str
    unit: str
    series: list[Series]
    summary: str
    log: bool = False
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)
    """Path of the vertical lines of each kind of event."""
    bounds: tuple[float, float, float, float] = (0, 1, 0, 1)
    """Lowest and highest step, lowest and highest value (its logarithm where `log`)."""

    def data(self) -> dict[str, Any]:
        """What the page's script needs: the drawn points and the bounds."""
        return {
            "unit": self.unit, "bounds": self.bounds,
            "series": [
                {"name": one.name, "x": [x for x, _ in one.points],
                 "y": [None if y != y else float(f"{y:.6g}") for _, y in one.points]}
                for one in self.series
            ],
        }  # fmt: skip


def charts_of(run: Run) -> list[Chart]:
    """Every chart there are numbers for."""
    train, evals = run.train, run.evals
    made: list[Chart | None] = [_loss(run)]

    def curve(key: str, title: str, unit: str, values: Sequence[float], noisy: bool = False, **options: Any) -> None:
        series = _curves(train.steps, values, "each step", noisy)
        made.append(_chart(run, key, title, unit, series, from_zero=True, **options))

    if len(evals):
        for key, title, unit, factor in (
            ("eval_perplexity", "Perplexity on evaluation data", "", 1.0),
            ("eval_token_accuracy", "Token accuracy on evaluation data", "%", 100.0),
        ):
            values = [factor * value for value in evals[key]]
            made.append(_chart(run, key, title, unit, [_evaluation(evals.steps, values)]))
    curve("learning_rate", "Learning rate", "", train["learning_rate"])
    curve("grad_norm", "Gradient norm", "", train["grad_norm"], noisy=True, may_be_log=True)
    curve("tokens_per_second", "Tokens a second", "", train["tokens_per_second"], noisy=True)
    made.append(_memory(run))
    seconds = train["step_seconds"]
    curve("waiting", "Waiting for weights", "% of a step", _ratio(train["wait_seconds"], seconds, 100.0), noisy=True)
    if any(value > 0 for value in train["data_seconds"]):
        curve("data", "Waiting for data", "% of a step", _ratio(train["data_seconds"], seconds, 100.0), noisy=True)
    curve("disk", "Read from disk", "GB/s", _ratio(train["bytes_read"], seconds, 1e-9), noisy=True)
    if any(value > 0 for value in train["bytes_copied"]):
        curve("copied", "Copied to the device", "GB/s", _ratio(train["bytes_copied"], seconds, 1e-9), noisy=True)
    curve("step_seconds", "Seconds a step", "s", seconds, noisy=True)
    return [chart for chart in made if chart is not None]


def averaged(count: int) -> int:
    """Steps that the mean over a noisy curve spans; 0: none is drawn over so few."""
    return max(count // 50, 5) if count >= _SMOOTH_FROM else 0


def _loss(run: Run) -> Chart | None:
    train, evals = run.train, run.evals
    series = _curves(train.steps, train["loss"], "training", noisy=True) if len(train) else []
    if len(evals):
        series.append(_evaluation(evals.steps, evals["eval_loss"]))
    return _chart(run, "loss", "Loss", "", series, may_be_log=True)


def _memory(run: Run) -> Chart | None:
    """Of a GPU's memory the highest so far, of the host's what the process holds after each step."""
    series = []
    for name, key, style in (("highest so far", "peak_bytes", "line"), ("process, now", "host_bytes", "line second")):
        gigabytes = [value / 1e9 for value in run.train[key]]
        if any(value > 0 for value in gigabytes):
            series.append(Series(name, style, thinned(run.train.steps, gigabytes)))
    return _chart(run, "memory", "Memory", "GB", series, from_zero=True)


def _curves(steps: Sequence[int], values: Sequence[float], name: str, noisy: bool) -> list[Series]:
    """A line; of many noisy values a faint one with their mean over it."""
    width = averaged(len(values))
    if not noisy or not width:
        return [Series(name, "line" if len(values) > 1 else "line dots", thinned(steps, values))]
    return [
        Series("each step", "raw", thinned(steps, values)),
        Series(f"{name}, mean of about {width:,} steps".removeprefix("each step, "), "line",
               thinned(steps, smoothed(values, width))),
    ]  # fmt: skip


def _evaluation(steps: Sequence[int], values: Sequence[float]) -> Series:
    return Series("evaluation", "line dots second", thinned(steps, values))


def _ratio(over: Sequence[float], under: Sequence[float], factor: float) -> list[float]:
    return [factor * a / b if b > 0 else math.nan for a, b in zip(over, under, strict=True)]


def _chart(
    run: Run,
    key: str,
    title: str,
    unit: str,
    series: list[Series],
    *,
    may_be_log: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    values = [y for one in series for _, y in one.points if y == y]
    if not values:
        return None
    x_low, x_high = _steps(run)
    low, high = min(values), max(values)
    log = may_be_log and low > 0 and high / sorted(values)[len(values) // 2] > _LOG_FROM
    place = math.log10 if log else float
    if log:
        y_ticks = log_ticks(low, high)
        y_low, y_high = place(low), place(high)
    else:
        y_low, y_high = (min(low, 0.0) if from_zero else low), high
        if y_high - y_low <= 1e-9 * abs(y_high):
            y_low, y_high = (0.0, 2 * y_high) if y_high > 0 else (y_low - 1, y_high + 1)
        y_ticks = []
    margin = 0.05 * (y_high - y_low)
    y_low, y_high = y_low - (0 if from_zero and y_low == 0 else margin), y_high + margin
    y_ticks = y_ticks or ticks(y_low, y_high, 6 if key == "loss" else 4)
    chart = Chart(key, title, unit, series, _summary(series, unit), log, bounds=(x_low, x_high, y_low, y_high))
    across, up = _scale(x_low, x_high), _scale(y_low, y_high)
    for one in series:
        one.path = _path(one, across, lambda value: BOX - up(place(value)))
    chart.x_ticks = [
        (across(tick) / BOX * 100, f"{tick:,.0f}") for tick in ticks(x_low, x_high, 5) if tick == int(tick)
    ]
    chart.y_ticks = [(100 - up(place(tick)) / BOX * 100, number_text(tick)) for tick in y_ticks]
    chart.marks = _marks(run, across) if key == "loss" else {}
    return chart


def _steps(run: Run) -> tuple[int, int]:
    ends = [steps[at] for steps in (run.train.steps, run.evals.steps) if len(steps) for at in (0, -1)]
    low, high = min(ends), max(ends)
    return (low, high) if high > low else (low, low + 1)


def _scale(low: float, high: float) -> Callable[[float], float]:
    return lambda value: (value - low) / (high - low) * BOX


def _path(series: Series, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    parts = []
    drawing = False
    for x, y in series.points:
        if y != y:
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{across(x):.1f} {down(y):.1f}" + ("" if drawing else "h0"))
        drawing = True
        if "dots" in series.style:
            parts[-1] = parts[-1].removesuffix("h0")
    return "".join(parts)


def dots(series: Series, chart: Chart) -> str:
    """A path of nothing but round ends, which no stretching of the box distorts."""
    x_low, x_high, y_low, y_high = chart.bounds
    across, up = _scale(x_low, x_high), _scale(y_low, y_high)
    place = math.log10 if chart.log else float
    return "".join(f"M{across(x):.1f} {BOX - up(place(y)):.1f}h0" for x, y in series.points if y == y)


def _marks(run: Run, across: Callable[[float], float]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in ("resumed", "skipped", "interrupted"):
        places = sorted({across(event.step) for event in run.events if event.kind == kind})
        inside = [place for place in places if 0 <= place <= BOX]
        if inside:
            found[kind] = "".join(f"M{place:.1f} 0V{BOX:.0f}" for place in inside[:: len(inside) // _MARKS + 1])
    return found


def _summary(series: list[Series], unit: str) -> str:
    """What the chart shows, for who does not see it."""
    said = []
    for one in series:
        finite = [(x, y) for x, y in one.points if y == y]
        if not finite or ("raw" in one.style and len(series) > 1):
            continue
        (low_step, low), (high_step, high) = min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])
        tail = f" {unit}" if unit else ""
        said.append(
            f"{one.name}: {number_text(finite[-1][1])}{tail} at step {finite[-1][0]:,}; lowest {number_text(low)}"
            f"{tail} (step {low_step:,}), highest {number_text(high)}{tail} (step {high_step:,})"
        )
    return ". ".join(said)
