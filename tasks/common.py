"""What the tasks share: their options, the model they take, questions with answers, and where to compute.

It knows nothing of how a model is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lema.prepare.tiny_model import tiny_model

TINY_LEARNING_RATE = 1e-2


def options(
    description: str | None, arguments: Sequence[str] | None, *, model: str, output: str, learning_rate: float,
    tokens: int, steps: int,
) -> argparse.Namespace:  # fmt: skip
    """A task's options, with its defaults. `--tiny` puts a random model in the place of the real one.

    Returns:
        `.model`, `.output`, `.device`, `.dtype`, `.learning_rate`, `.tokens`, `.steps`, `.tiny`.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", default=model, help="hub id or folder")
    made.add_argument("--output", type=Path, default=Path(output), help="where the adapter goes")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    made.add_argument("--learning-rate", type=float, default=learning_rate, help=f"tiny model: {TINY_LEARNING_RATE}")
    made.add_argument("--tokens", type=int, default=tokens, help="at most, a row")
    made.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    made.add_argument("--tiny", action="store_true", help="a random model of four layers: offline, in seconds")
    given = made.parse_args(arguments)
    given.dtype = half_precision() if given.device.startswith("cuda") else "float32"
    if given.tiny:
        given.model, given.learning_rate = str(tiny_model(given.output / "model")), TINY_LEARNING_RATE
    elif given.device == "cpu":
        print("no GPU is used: a model of billions of parameters takes minutes a step on the CPU", file=sys.stderr)
    return given


def half_precision() -> str:
    """bfloat16 where the card computes in it, else float16 (T4, P100)."""
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def questions() -> list[dict[str, str]]:
    """The package's own questions as `prompt` and `completion`, one line each: no chat template is needed."""
    rows = []
    for line in (files("lema.data") / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        rows.append({"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"})
    return rows


def batch(tokenizer: Any, rows: Sequence[dict[str, str]], tokens: int) -> dict[str, torch.Tensor]:
    """Rows as ids, mask and labels `[rows, longest]`; padding is no target, the end token is."""
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = dict(
        tokenizer(texts, padding=True, padding_side="right", truncation=True, max_length=tokens, return_tensors="pt")
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
