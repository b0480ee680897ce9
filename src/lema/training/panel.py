"""What one sees of a run: a panel that stays in place on a terminal, else a line now and then.

A view is told numbers and decides how people read them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_STEPS_AVERAGED = 20


class View:
    """Shows nothing; what others build on."""

    def begin(self, step: int, max_steps: int, device: str) -> None:
        """The run begins, or goes on after `step`."""

    def step(self, line: Mapping[str, Any]) -> None:
        """A step is done; `line` is what `metrics.jsonl` says of it."""

    def log(self, logs: Mapping[str, Any]) -> None:
        """An entry of the log."""

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """An evaluation is done."""

    def event(self, message: str) -> None:
        """Something that is not a number: saved, skipped, interrupted."""

    def end(self) -> None:
        """The run is over."""


class _Recent(View):
    """Keeps what the last steps took, to tell rates and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=_STEPS_AVERAGED)
        self._max_steps = 0
        self._device = "cpu"

    def begin(self, step: int, max_steps: int, device: str) -> None:
        self._max_steps, self._device = max_steps, device

    def step(self, line: Mapping[str, Any]) -> None:
        self._lines.append(line)

    def rates(self) -> dict[str, str]:
        """Of the last steps: tokens a second, time left, what was read and copied, how long was waited."""
        lines = list(self._lines)
        seconds = sum(line["step_seconds"] for line in lines) or 1e-9
        waited = sum(line["wait_seconds"] + line.get("data_seconds", 0.0) for line in lines)
        left = (self._max_steps - lines[-1]["step"]) * seconds / len(lines) if lines else 0.0
        found = {
            "tokens/s": _short(sum(line["tokens"] for line in lines) / seconds),
            "time left": duration(left),
            "disk": f"{_short(sum(line['bytes_read'] for line in lines) / seconds / 1e9)} GB/s",
            "waiting": f"{min(100 * waited / seconds, 100):.0f}%",
        }
        if self._device != "cpu":
            copied = sum(line.get("bytes_copied", 0) for line in lines)
            found["link"] = f"{_short(copied / seconds / 1e9)} GB/s"
            found["device memory"] = f"{max(line['peak_bytes'] for line in lines) / 1e9:.2f} GB" if lines else ""
        if lines:
            found["host memory"] = f"{max(line.get('host_bytes', 0) for line in lines) / 1e9:.2f} GB"
        return found


class PlainLines(_Recent):
    """A line for every entry of the log."""

    def begin(self, step: int, max_steps: int, device: str) -> None:
        super().begin(step, max_steps, device)
        if step:
            self._say(f"going on after step {step} of {max_steps}")

    def log(self, logs: Mapping[str, Any]) -> None:
        rates = "  ".join(f"{name} {value}" for name, value in self.rates().items())
        self._say(f"step {logs['step']}/{self._max_steps}  {_numbers(logs)}  {rates}")

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        self._say(f"step {metrics['step']}/{self._max_steps}  {_evaluation(metrics)}")

    def event(self, message: str) -> None:
        self._say(message)

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


class LivePanel(_Recent):
    """A panel on a terminal, brought up to date with every step; messages go above it."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._live = Live(console=self.console, refresh_per_second=4, transient=False)
        self._evaluation = ""
        self._started = time.monotonic()

    def begin(self, step: int, max_steps: int, device: str) -> None:
        super().begin(step, max_steps, device)
        self._live.start()

    def step(self, line: Mapping[str, Any]) -> None:
        super().step(line)
        self._live.update(self._panel(line))

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        self._evaluation = f"step {metrics['step']}: {_evaluation(metrics)}"

    def event(self, message: str) -> None:
        self.console.print(Text(message))

    def end(self) -> None:
        self._live.stop()

    def _panel(self, line: Mapping[str, Any]) -> Panel:
        table = Table.grid(padding=(0, 2))
        step = line["step"]
        table.add_row("step", f"{step} of {self._max_steps}")
        table.add_row("", ProgressBar(total=self._max_steps, completed=step, width=30))
        table.add_row("epoch", f"{line['epoch']:.2f}")
        table.add_row("loss", _numbers(line))
        rates = self.rates()
        table.add_row("speed", f"{rates.pop('tokens/s')} tokens/s, {rates.pop('time left')} left")
        table.add_row("traffic", ", ".join(f"{name} {value}" for name, value in rates.items()))
        if self._evaluation:
            table.add_row("evaluation", self._evaluation)
        return Panel(table, title="lema train", title_align="left", expand=False)


def make_view(plain: bool | None = None, console: Console | None = None) -> View:
    """The panel on a terminal, else plain lines; True or False: one or the other in any case."""
    console = console or Console()
    if plain is None:
        plain = not console.is_terminal
    return PlainLines(console) if plain else LivePanel(console)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as people say them: `1h02m`, `3m20s`, `12s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _numbers(logs: Mapping[str, Any]) -> str:
    parts = [f"{logs['loss']:.4f}" if logs.get("loss") is not None else "none (skipped)"]
    parts.append(f"lr {logs['learning_rate']:.3g}")
    if logs.get("grad_norm") is not None:
        parts.append(f"grad norm {logs['grad_norm']:.3g}")
    return "  ".join(parts)


def _evaluation(metrics: Mapping[str, Any]) -> str:
    return (
        f"eval loss {metrics['eval_loss']:.4f}  perplexity {metrics['eval_perplexity']:.4g}  "
        f"token accuracy {metrics['eval_token_accuracy']:.1%}"
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
