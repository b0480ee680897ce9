"""Folders of runs, as training leaves them, written without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

NAN = float("nan")


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl` as training writes it."""
    return {
        "type": "train", "step": step, "epoch": step / 50, "loss": 1 + 2 * math.exp(-step / 30),
        "learning_rate": 1e-4 * (1 - step / 200), "grad_norm": 0.5 + 0.1 * math.sin(step), "tokens": 4096,
        "targets": 2000, "step_seconds": 2.0, "wait_seconds": 0.5, "bytes_read": 3_000_000_000,
        "bytes_copied": 1_000_000_000, "tokens_per_second": 2048.0, "peak_bytes": 3_000_000_000,
        "host_bytes": 2_000_000_000 + step, "time": 1.7e9 + 2 * step, **changes,
    }  # fmt: skip


def eval_line(step: int, loss: float = 1.5) -> dict[str, Any]:
    """A line of an evaluation."""
    return {"type": "eval", "step": step, "epoch": step / 50, "eval_loss": loss, "eval_perplexity": math.exp(loss),
            "eval_token_accuracy": 0.7, "eval_targets": 500, "seconds": 3.0}  # fmt: skip


def step_timeline(layers: int = 8) -> dict[str, Any]:
    """A timeline in which disk reads overlap and computation waits once."""
    disk = [{"name": f"layer {n}", "start": 0.1 * n, "end": 0.1 * n + 0.15, "bytes": 50_000_000} for n in range(layers)]
    copy = [{"name": f"layer {n}", "start": 0.1 * n + 0.15, "end": 0.1 * n + 0.17, "bytes": 50_000_000}
            for n in range(layers)]  # fmt: skip
    compute = [{"name": f"layer {n} forward", "start": 0.1 * n + 0.17, "end": 0.1 * n + 0.2} for n in range(layers)]
    compute.append({"name": "head and loss", "start": 1.0, "end": 1.2})
    compute += [{"name": f"layer {layers - 1 - n} backward", "start": 1.2 + 0.1 * n, "end": 1.3 + 0.1 * n}
                for n in range(layers)]  # fmt: skip
    compute.append({"name": "optimizer", "start": 2.0, "end": 2.02})
    wait = [{"name": "layer 0", "start": 0.0, "end": 0.17}]
    lanes = {"disk": disk, "copy": copy, "compute": compute, "wait": wait}
    return {"step": 2, "seconds": 2.1, "lanes": [{"name": name, "spans": spans} for name, spans in lanes.items()]}


def make_run(folder: Path, steps: int = 120, extra: list[Any] | None = None) -> Path:
    """A run's folder with every file."""
    (folder / "final").mkdir(parents=True, exist_ok=True)
    lines: list[Any] = []
    for step in range(1, steps + 1):
        lines.append(train_line(step))
        if step % 40 == 0:
            lines.append(eval_line(step, 1 + 60 / step))
        if step == 60:
            lines.append({"type": "event", "step": 60, "event": "resumed", "message": "from checkpoint-60"})
    lines.append({"type": "event", "step": 70, "event": "skipped", "message": "the gradient norm is inf"})
    write_lines(folder / "metrics.jsonl", [*lines, *(extra or [])])
    samples = [{"step": step, "prompt": prompt, "text": f"answer {step} to {prompt}"}
               for step in (0, 40, 80, 120) for prompt in ("Why is the sky blue?", "Write a haiku.")]  # fmt: skip
    write_lines(folder / "samples.jsonl", samples)
    (folder / "run.yaml").write_text("model_name_or_path: some/model\nlearning_rate: 0.0001\ntargets:\n- q_proj\n")
    histogram = [{"from": 0, "to": 100, "rows": 30}, {"from": 100, "to": 200, "rows": 90}]
    summary = {"train": {"rows": 120, "sample": {"trained_share": 0.5, "length_histogram": histogram}}, "eval": None}
    (folder / "data_summary.json").write_text(json.dumps(summary))
    (folder / "timeline.json").write_text(json.dumps(step_timeline()))
    return folder


def write_lines(path: Path, lines: list[Any]) -> None:
    """JSON lines; text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


HOSTILE = [
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 191 }}{% raw %}", "<!--<script>",
    "' onmouseover='alert(1)", "]]></style><svg onload=alert(1)>", "\u202egnp.exe", "a\0b", "\ud800 half", "&lt;b&gt;",
    "javascript:alert(1)", "</bdi></p></main>", "\u2028\u2029",
]  # fmt: skip
