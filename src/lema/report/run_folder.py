"""The files of a run folder, as far as they are there and whole.

What is missing or damaged becomes a note, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ReportError
from .table import Table, as_step

TRAIN = (
    "epoch", "loss", "learning_rate", "grad_norm", "tokens", "targets", "step_seconds", "wait_seconds", "data_seconds",
    "bytes_read",    "bytes_copied", "tokens_per_second", "peak_bytes", "host_bytes", "time",
)  # fmt: skip
EVAL = ("epoch", "eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_targets", "seconds")
FILES = ("metrics.jsonl", "run.yaml", "samples.jsonl", "data_summary.json", "timeline.json")
_LINE_BYTES = 1 << 20
_FILE_BYTES = 16 << 20
_NAMED_LINES = 8


@dataclass(frozen=True)
class RunEvent:
    """Something that happened beside steps and evaluations."""

    step: int
    kind: str
    message: str


@dataclass(frozen=True)
class Sample:
    """What the model answered to a prompt at a step."""

    step: int
    prompt: str
    text: str


@dataclass
class Run:
    """What is known of a run."""

    folder: Path
    train: Table = field(default_factory=lambda: Table(TRAIN))
    evals: Table = field(default_factory=lambda: Table(EVAL))
    events: list[RunEvent] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    config: str | None = None
    summary: Any = None
    timeline: Any = None
    finished: bool = False
    written: float | None = None
    """When `metrics.jsonl` was last written to, seconds since the epoch."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged."""


def read_run(folder: Path) -> Run:
    """Read what there is.

    Raises:
        ReportError: no such folder, or none of a run's files in it.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder: give the output_dir of a run")
    if not any((folder / name).exists() for name in FILES):
        raise ReportError(f"{folder} has none of {', '.join(FILES)}: it is not the output_dir of a run")
    run = Run(folder, finished=(folder / "final").is_dir())
    for name, what in zip(FILES, ("curves", "configuration", "samples", "data summary", "timeline"), strict=True):
        if not (folder / name).exists():
            run.notes.append(f"{name} is not there (yet): no {what}.")
    _read_lines(run, folder / "metrics.jsonl", lambda line: _take_metrics(run, line))
    _read_lines(run, folder / "samples.jsonl", lambda line: _take_sample(run, line))
    for table in (run.train, run.evals):
        table.settle()
    run.config = _read_text(run, folder / "run.yaml")
    run.summary = _read_json(run, folder / "data_summary.json")
    run.timeline = _read_json(run, folder / "timeline.json")
    _note_tables(run)
    return run


# -- lines -----------------------------------------------------------------------------------------


def _read_lines(run: Run, path: Path, take: Any) -> None:
    """Give every line that is a JSON object to `take`, which returns False for one it cannot use."""
    damaged: list[int] = []
    unfinished = False
    try:
        for number, line, ended in _lines(path):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
                good = isinstance(content, dict) and take(content)
            except (ValueError, RecursionError):
                good = False
            if not good and ended:
                damaged.append(number)
            elif not good:
                unfinished = True
        if path.name == "metrics.jsonl":
            run.written = path.stat().st_mtime
    except FileNotFoundError:
        return
    except OSError as error:
        run.notes.append(f"{path.name} could not be read to its end: {error.strerror}.")
    if damaged:
        named = ", ".join(map(str, damaged[:_NAMED_LINES])) + (", …" if len(damaged) > _NAMED_LINES else "")
        lines = "1 line is" if len(damaged) == 1 else f"{len(damaged):,} lines are"
        run.notes.append(f"{path.name}: {lines} damaged and left out (line {named}).")
    if unfinished:
        run.notes.append(f"{path.name}: the last line is not complete; it is being written, or the run was killed.")


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, bytes and whether it has its end, of every line; of one that is too long nothing but the number."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LINE_BYTES):
            number += 1
            whole = len(line) < _LINE_BYTES or line.endswith(b"\n")
            ended = line.endswith(b"\n")
            while not whole and (more := file.readline(_LINE_BYTES)):
                whole = ended = more.endswith(b"\n")
            yield number, line if len(line) < _LINE_BYTES else b"?", ended


def _take_metrics(run: Run, line: dict[str, Any]) -> bool:
    step, kind = as_step(line.get("step")), line.get("type")
    if step is None:
        return False
    if kind in ("train", "eval"):
        (run.train if kind == "train" else run.evals).add(step, line)
    elif kind == "event":
        event = RunEvent(step, text_of(line.get("event", "?")), text_of(line.get("message", "")))
        run.events.append(event)
        if event.kind == "resumed":
            run.train.forget_after(step)
            run.evals.forget_after(step)
    else:
        return False
    return True


def _take_sample(run: Run, line: dict[str, Any]) -> bool:
    step, prompt, text = as_step(line.get("step")), line.get("prompt"), line.get("text")
    if step is None or not isinstance(prompt, str) or not isinstance(text, str):
        return False
    run.samples.append(Sample(step, text_of(prompt), text_of(text)))
    return True


def text_of(value: Any) -> str:
    """A value as text that every encoding can hold: half characters (lone surrogates) are replaced."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")


# -- whole files -----------------------------------------------------------------------------------


def _read_text(run: Run, path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        run.notes.append(f"{path.name} could not be read: {error.strerror}.")
        return None
    if len(content) > _FILE_BYTES:
        run.notes.append(f"{path.name} has more than {_FILE_BYTES >> 20} MiB and is left out.")
        return None
    return content.decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")


def _read_json(run: Run, path: Path) -> Any:
    text = _read_text(run, path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        run.notes.append(f"{path.name} is not valid JSON ({text_of(str(error))}) and is left out.")
        return None


def _note_tables(run: Run) -> None:
    for table, kind in ((run.train, "step"), (run.evals, "evaluation")):
        if table.superseded:
            lines = f"1 {kind} line is" if table.superseded == 1 else f"{table.superseded:,} {kind} lines are"
            run.notes.append(
                f"metrics.jsonl: {lines} left out, as the run went back to before and took those steps again."
            )
        for name, count in sorted(table.not_finite.items()):
            values = "1 value is" if count == 1 else f"{count:,} values are"
            run.notes.append(f"{name}: {values} no finite number; the curve has a gap there.")
