"""What a run leaves behind of itself while it runs: metrics, samples, events, and what is on the screen.

It knows lines and views; it knows nothing of when there is something to tell.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.atomic import write_text
from .metrics import METRICS_FILE, SAMPLES_FILE, JsonLines
from .panel import View


class Journal:
    """Tells the files and the view. A full disk is told once and does not end the run: files catch up when there is
    room again.

    Args:
        writes: False: nothing is told; another process does.
    """

    def __init__(self, folder: Path, view: View, writes: bool = True) -> None:
        self.view = view if writes else View()
        self._metrics = JsonLines(folder / METRICS_FILE) if writes else None
        self._samples = JsonLines(folder / SAMPLES_FILE) if writes else None
        self._failing = False
        self.resumed = self._metrics is not None and self._metrics.resumed
        """Whether a run before wrote here."""

    def step(self, line: dict[str, Any]) -> None:
        """A step is done."""
        self._write(self._metrics, {"type": "train", **line, "time": round(time.time(), 3)})
        self.view.step(line)

    def evaluation(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """An evaluation is done."""
        self._write(self._metrics, {"type": "eval", "step": step, "epoch": epoch, **metrics})
        self.view.evaluated({"step": step, **metrics})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A prompt was answered."""
        self._write(self._samples, {"step": step, "prompt": prompt, "text": text})

    def event(self, step: int, event: str, message: str) -> None:
        """Something happened that is not a number."""
        line = {"type": "event", "step": step, "event": event, "message": message, "time": round(time.time(), 3)}
        self._write(self._metrics, line)
        self.view.event(message)

    def close(self) -> None:
        """Let go of files and screen."""
        for file in filter(None, (self._metrics, self._samples)):
            try:
                file.close()
            except OSError as error:
                self.view.event(f"{file.path.name} is not complete: {error}")
        self.view.end()

    def _write(self, file: JsonLines | None, values: dict[str, Any]) -> None:
        if file is None:
            return
        try:
            file.write({name: _finite(value) for name, value in values.items()})
            self._failing = False
        except OSError as error:
            if not self._failing:
                self.view.event(f"{file.path.name} cannot be written: {error}; training goes on")
            self._failing = True


def _finite(value: Any) -> Any:
    """JSON has no NaN; what is not finite is written as text, so that it is not hidden."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
