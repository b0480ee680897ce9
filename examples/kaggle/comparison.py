"""LEMA beside PEFT on models of the hub: where the weights are, the arms, their numbers as rows of a table.

It knows which numbers are asked for, not what they are good for; how an arm measures itself is `benchmarks/arms.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.processes import Arm, describe, run_arm

from lema.prepare.tiny_model import KINDS, tiny_model

MODELS = {
    "gpt2": "gpt2",
    "TinyLlama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "SmolLM2-1.7B": "HuggingFaceTB/SmolLM2-1.7B",
    "Llama-2-7B": "NousResearch/Llama-2-7b-hf",
}
ARMS = {"LEMA": "lema", "PEFT": "peft", "PEFT+checkpointing": "peft_checkpointing"}
RANK = 16
Row = dict[str, Any]


def parser(description: str | None, models: Sequence[str], tokens: str, steps: int) -> argparse.ArgumentParser:
    """What both comparisons take."""
    card = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--models", default=",".join(models), help=f"of {', '.join(MODELS)}, or folders; between commas")
    made.add_argument("--tokens", default=tokens, help="a row; several between commas")
    made.add_argument("--steps", type=int, default=steps, help="in all; the first only warms up")
    made.add_argument("--device", default="cuda" if card else "cpu")
    made.add_argument("--dtype", default="float16" if card else "float32", help="float16, bfloat16 or float32")
    made.add_argument("--set", action="append", default=[], help="a setting of LEMA, as vram_budget=4GB; repeatable")
    made.add_argument("--timeout", type=float, default=3600, help="seconds an arm may take")
    made.add_argument("--json", type=Path, help="write the rows to this file too")
    made.add_argument("--tiny", action="store_true", help="random models of four layers: offline, in seconds")
    return made


def compare(given: argparse.Namespace) -> list[Row]:
    """Every arm on every model at every length, one process after the other, alone on the machine.

    Returns:
        Rows of `model`, `tokens`, `arm`, `device` and either `failure` or numbers: `seconds` a step (median),
        `vram_mib` (peak of tensors, on a card), `ram_mib` (peak resident set above what importing takes), `loss`.
    """
    if given.device == "cpu":
        print("no card is used: memory is host memory, speed is the CPU's", file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, folder in _folders(given, Path(place)):
            for tokens in (int(one) for one in given.tokens.split(",")):
                settings = {
                    "device": given.device, "dtype": given.dtype, "tokens": tokens, "rank": RANK, "steps": given.steps
                }  # fmt: skip
                for label, kind in ARMS.items():
                    options = {**settings, "set": given.set} if kind == "lema" else settings
                    run = run_arm(Arm(f"{name}, {tokens} tokens, {label}", kind, folder, options), 0, given.timeout)
                    describe(run)
                    row: Row = {"model": name, "tokens": tokens, "arm": label, "device": given.device}
                    rows.append(row | (_numbers(run.numbers) if run.numbers else {"failure": run.failure}))
                    _save(rows, given.json)
    return rows


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """Rows as Markdown; `columns` has the numbers' keys and their headings."""
    head = ["model", "tokens", "arm", *columns.values()]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        numbers = [f"{row[key]:,.3f}" if row.get(key) is not None else row.get("failure", "-") for key in columns]
        lines.append([row["model"], str(row["tokens"]), row["arm"], *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folders(given: argparse.Namespace, place: Path) -> Iterator[tuple[str, Path]]:
    """The models' names and folders, each fetched when its turn comes."""
    if given.tiny:
        for kind in KINDS:
            yield f"tiny {kind}", tiny_model(place / kind, kind)
        return
    for name in given.models.split(","):
        if name in MODELS:
            folder = snapshot_download(MODELS[name], allow_patterns=["*.json", "*.safetensors"], ignore_patterns="*/*")
            yield name, Path(folder)
        elif (Path(name) / "config.json").is_file():
            yield Path(name).name, Path(name)
        else:
            raise SystemExit(f"{name}: neither of {', '.join(MODELS)} nor a folder with a config.json")


def _numbers(found: dict[str, Any]) -> Row:
    return {
        "seconds": found["median_step_seconds"],
        "vram_mib": found.get("device_peak_mib"),
        "ram_mib": found["above_floor_mib"],
        "loss": found["losses"][-1],
    }


def _save(rows: list[Row], path: Path | None) -> None:
    """After every arm, so that a run that is killed leaves what it found."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
