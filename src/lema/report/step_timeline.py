"""The timeline of one step as rectangles in rows, and how busy each lane was.

The form of `timeline.json` is all there is to go by, whoever wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .run_folder import text_of
from .table import as_number

ROW, GAP = 18, 10
"""Height of a row of rectangles and of the gap between lanes, in pixels."""
_MOST_SPANS = 6000
_MOST_ROWS = 12
_TITLES = {"disk": "Disk", "copy": "Copy", "compute": "Compute", "wait": "Waiting"}
_WORDS = {"disk": "reads", "copy": "copies", "compute": "computation", "wait": "waiting for weights"}
_KINDS = ("forward", "backward", "head", "optimizer")


@dataclass(frozen=True)
class Bar:
    """A span to draw: times in seconds, `top` in pixels."""

    lane: int
    name: str
    start: float
    end: float
    nbytes: float
    cut: bool
    top: int
    kind: str


@dataclass
class LaneView:
    """One lane: its place, and its figures."""

    name: str
    title: str
    top: int
    height: int
    busy: float
    nbytes: float
    count: int


@dataclass
class StepTimeline:
    """The whole figure."""

    step: int | None
    seconds: float
    lanes: list[LaneView] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    height: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The busiest lane and the waiting, in a sentence."""
        working = [lane for lane in self.lanes if lane.name != "wait" and lane.count]
        if not working or not self.seconds > 0:
            return ""
        busiest = max(working, key=lambda lane: lane.busy)
        share = 100 * busiest.busy / self.seconds
        said = f"Busiest: {_WORDS.get(busiest.name, busiest.title)}, {share:.0f} % of the step."
        waited = sum(lane.busy for lane in self.lanes if lane.name == "wait")
        return said + f" The computation waited for weights {100 * waited / self.seconds:.0f} % of it."

    @property
    def kinds(self) -> list[str]:
        """Kinds of bars there are, in the order of the legend."""
        there = {bar.kind for bar in self.bars}
        return [kind for kind in ("disk", "copy", *_KINDS, "compute", "wait", "other") if kind in there]

    def data(self) -> dict[str, Any]:
        """What the page's script needs, one list a bar."""
        return {
            "seconds": self.seconds,
            "lanes": [lane.title for lane in self.lanes],
            "bars": [
                [bar.lane, bar.name, round(bar.start, 6), round(bar.end, 6), bar.nbytes, int(bar.cut)]
                for bar in self.bars
            ],
        }


def timeline_of(content: Any) -> StepTimeline | None:
    """What can be drawn of the content of `timeline.json`; None if that is nothing."""
    lanes = content.get("lanes") if isinstance(content, dict) else None
    if not isinstance(lanes, list):
        return None
    seconds = as_number(content.get("seconds"))
    step = content.get("step")
    view = StepTimeline(step if isinstance(step, int) and not isinstance(step, bool) else None, seconds)
    damaged = 0
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for lane in lanes:
        spans = lane.get("spans") if isinstance(lane, dict) else None
        if not isinstance(spans, list):
            damaged += 1
            continue
        good = [span for span in spans if _is_span(span)]
        damaged += len(spans) - len(good)
        found.append((text_of(lane.get("name", "?")), sorted(good, key=lambda span: span["start"])))
    if damaged:
        view.notes.append(f"timeline.json: {damaged:,} spans or lanes have no proper start and end and are left out.")
    every = [span for _, spans in found for span in spans]
    if not every:
        return None
    view.seconds = max([seconds if seconds > 0 else 0.0, *(span["end"] for span in every)])
    if not view.seconds > 0:
        return None
    _draw(view, found, _shortest_drawn(view, every))
    return view


def _is_span(span: Any) -> bool:
    if not isinstance(span, dict):
        return False
    start, end = as_number(span.get("start")), as_number(span.get("end"))
    return 0 <= start <= end


def _shortest_drawn(view: StepTimeline, every: list[dict[str, Any]]) -> float:
    """Seconds a span must take to be drawn: the longest ones are, up to a number that a page can hold."""
    if len(every) <= _MOST_SPANS:
        return 0.0
    lengths = sorted((span["end"] - span["start"] for span in every), reverse=True)
    view.notes.append(f"Of {len(every):,} spans the longest are drawn; the figures below the drawing count all.")
    return float(lengths[_MOST_SPANS])


def _draw(view: StepTimeline, lanes: list[tuple[str, list[dict[str, Any]]]], shortest: float) -> None:
    top = 0
    for name, spans in lanes:
        if not spans:
            continue
        free_from: list[float] = []
        for span in spans:
            start, end = float(span["start"]), float(span["end"])
            if end - start <= shortest > 0:
                continue
            row = next((at for at, free in enumerate(free_from) if free <= start), len(free_from))
            if row == len(free_from):
                free_from.append(end)
            free_from[row] = end
            said = text_of(span.get("name", "?"))[:200]
            place = top + min(row, _MOST_ROWS - 1) * ROW
            view.bars.append(
                Bar(len(view.lanes), said, start, end, _nbytes(span), span.get("cut") is True, place, _kind(name, said))
            )
        height = max(min(len(free_from), _MOST_ROWS), 1) * ROW
        total = sum(_nbytes(span) for span in spans)
        view.lanes.append(LaneView(name, _TITLES.get(name, name), top, height, _busy(spans), total, len(spans)))
        top += height + GAP
    view.height = top - GAP


def _nbytes(span: dict[str, Any]) -> float:
    nbytes = as_number(span.get("bytes"))
    return nbytes if nbytes > 0 else 0.0


def _kind(lane: str, name: str) -> str:
    if lane != "compute":
        return lane if lane in _TITLES else "other"
    return next((kind for kind in _KINDS if kind in name), "compute")


def _busy(spans: list[dict[str, Any]]) -> float:
    total, reached = 0.0, 0.0
    for span in spans:
        total += max(span["end"] - max(span["start"], reached), 0.0)
        reached = max(reached, span["end"])
    return total
