"""The page: everything of a run put into one HTML file.

It knows what goes where on the page; what is drawn the other modules of this room say. Values are escaped by the
template's autoescape, and the page's own policy lets no script run but its own and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..storage.atomic import write_text
from .charts import averaged, charts_of, dots
from .run_folder import Run, read_run, text_of
from .samples import samples_of
from .series import bytes_text, duration_text, number_text
from .step_timeline import timeline_of
from .summary import groups_of

_HERE = Path(__file__).parent
_MOST_EVENTS = 300
_SETTING = re.compile(r"([A-Za-z_][\w-]*)(:.*)", re.DOTALL)


@dataclass(frozen=True)
class Written:
    """The file written, and what the run's folder lacks."""

    path: Path
    notes: list[str]


def write_report(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Written:
    """Write the page of a run, whole or not at all. The run may be going on.

    Args:
        folder: the run's `output_dir`.
        out: the file to write; None: `report.html` in the folder.

    Raises:
        ReportError: the folder is not that of a run.
        OSError: the file cannot be written.
    """
    run = read_run(Path(folder))
    path = Path(out) if out is not None else run.folder / "report.html"
    html, notes = render(run)
    write_text(path, html)
    return Written(path, notes)


def render(run: Run) -> tuple[str, list[str]]:
    """The page's HTML, and its notes on what is missing or damaged."""
    charts = charts_of(run)
    timeline = timeline_of(run.timeline)
    notes = [*run.notes, *(timeline.notes if timeline is not None else [])]
    if timeline is None and run.timeline is not None:
        notes.append("timeline.json has no lanes of spans: no timeline.")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    settings = _settings(run.config or "")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number_text, "bytes": bytes_text, "duration": duration_text}
    html = environment.get_template("page.html").render(
        run=run, name=text_of(run.folder.absolute().name), model=_setting(settings, "model_name_or_path"),
        state=_state(run), made=time.strftime("%Y-%m-%d %H:%M", time.localtime()), version=__version__, notes=notes,
        tiles=_tiles(run), charts=charts, dots=dots, averaged=averaged(len(run.train)), timeline=timeline,
        samples=samples_of(run.samples), events=_events(run), groups=groups_of(run.summary), settings=settings,
        script=script, script_hash=_hash(script), style=(_HERE / "page.css").read_text(encoding="utf-8"),
        data={
            "charts": [chart.data() for chart in charts],
            "timeline": timeline.data() if timeline is not None else None,
        },
    )  # fmt: skip
    return html, notes


def _hash(script: str) -> str:
    """As a content security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    if run.written is None:
        return "not begun"
    ago = max(time.time() - run.written, 0.0)
    return f"not finished; last line {duration_text(ago)} ago"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Title, value and remark of the figures at the top."""
    train, evals = run.train, run.evals
    tiles: list[tuple[str, str, str]] = []
    if len(train):
        epoch = train["epoch"][-1]
        tiles.append(("Steps", f"{train.steps[-1]:,}", f"epoch {number_text(epoch, 3)}" if epoch == epoch else ""))
        losses = [value for value in train["loss"] if value == value]
        if losses:
            tiles.append(("Training loss", number_text(losses[-1]), f"began at {number_text(losses[0])}"))
    best = [(value, step) for value, step in zip(evals["eval_loss"], evals.steps, strict=True) if value == value]
    if best:
        value, step = min(best)
        tiles.append(("Best evaluation loss", number_text(value), f"at step {step:,}"))
    if len(train):
        tokens, seconds = _total(train["tokens"]), _total(train["step_seconds"])
        if tokens:
            rate = f"{number_text(tokens / seconds, 3)} a second" if seconds else ""
            tiles.append(("Tokens", _short(tokens), rate))
        if seconds:
            tiles.append(("Time in steps", duration_text(seconds), f"{number_text(seconds / len(train), 3)} s a step"))
            share = 100 * _total(train["wait_seconds"]) / seconds
            tiles.append(("Waiting for weights", f"{share:.0f} %", "of that time"))
        peaks = [value for value in train["peak_bytes"] if value == value]
        if peaks:
            tiles.append(("Most memory", bytes_text(max(peaks)), ""))
        if read := _total(train["bytes_read"]):
            tiles.append(("Read from disk", bytes_text(read), f"{bytes_text(read / len(train))} a step"))
    return tiles


def _total(values: Any) -> float:
    return sum(value for value in values if value == value)


def _short(count: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{number_text(count / size, 3)} {unit}"
    return f"{count:,.0f}"


def _settings(config: str) -> list[tuple[str, str]]:
    """Lines of the configuration: the setting's name, where the line begins with one, and the rest."""
    lines = []
    for line in config.splitlines():
        match = _SETTING.fullmatch(line)
        lines.append((match[1], match[2]) if match else ("", line))
    return lines


def _setting(settings: list[tuple[str, str]], name: str) -> str:
    return next((rest[1:].strip().strip("'\"") for key, rest in settings if key == name), "")


def _events(run: Run) -> dict[str, Any]:
    """Counts by kind, and the last events of each; of saves alone only the count matters much."""
    counts: dict[str, int] = {}
    for event in run.events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    shown = run.events[-_MOST_EVENTS:]
    return {"counts": counts, "shown": shown, "left_out": len(run.events) - len(shown)}
