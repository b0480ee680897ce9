"""The comparison the original published: memory and step time over four real models, at 128 and 512 tokens.

LEMA without a budget (two layers and what they need), within budgets, and PEFT with and without gradient
checkpointing. It knows models by name and the arms; it does not know how an arm measures itself.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .options import command_line, common_options, parse, several, written_budget
from .processes import Arm, Option, describe, run_arm
from .report import Report, Table, median_of, number, save, write
from .tables import ARMS_ALIKE, MEMORY, SECONDS, bars, labels_of

MODULE = "benchmarks.published"
MODELS = ("gpt2", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "HuggingFaceTB/SmolLM2-1.7B", "NousResearch/Llama-2-7b-hf")
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
VRAM = "device_peak_mib"
LEAST = 60
"""Seconds that have to be left for another arm."""
NOTES = (
    "Memory is the peak of what tensors take of the card, by torch's own count; on a CPU the peak of the process above "
    "its imports.",
    ARMS_ALIKE,
    "The original's own numbers (Tesla P100, fp16, rank 16, 512 tokens): Llama-2 7B 5.90 GB and 7.21 s/step, "
    "SmolLM2 1.7B 3.20 GB, TinyLlama 2.12 GB and 1.45 s/step, GPT-2 1.05 GB.",
)


def fetched(name: str, cache: Path) -> Path:
    """A folder with the model: itself, or its files from the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    place = cache / name.replace("/", "--")
    return Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns="*/*", local_dir=place))


def arms_of(name: str, folder: Path, tokens: int, options: argparse.Namespace) -> list[Arm]:
    """What is compared on one model at one length."""
    label = f"{name.rstrip('/').rpartition('/')[2]}, {tokens} tokens"
    shared: dict[str, Option] = {
        "device": options.device, "dtype": options.dtype, "tokens": tokens, "rank": options.rank,
        "steps": options.steps,
    }  # fmt: skip
    budget = "vram_budget" if options.device != "cpu" else "ram_budget"
    arms = [Arm(f"{label}: LEMA", "lema", folder, shared)]
    for size in options.budgets:
        ram = ["ram_budget=auto"] if options.device != "cpu" else []
        arms.append(Arm(f"{label}: LEMA, {size}", "lema", folder, {**shared, "set": [f"{budget}={size}", *ram]}))
    arms.append(Arm(f"{label}: PEFT+checkpointing", "peft_checkpointing", folder, shared))
    arms.append(Arm(f"{label}: PEFT", "peft", folder, shared))
    return arms


def measure(report: Report, options: argparse.Namespace, cache: Path) -> None:
    """All arms of all models within the minutes given; what is known is written after every arm."""
    ends = time.monotonic() + 60 * options.minutes
    for name in options.models:
        if ends - time.monotonic() < LEAST:
            report.facts[f"left out: {name}"] = "no time was left"
            continue
        try:
            folder = fetched(name, cache)
        except OSError as error:  # of the network, the hub or the disk; the other models can still be measured
            report.facts[f"left out: {name}"] = f"not fetched: {type(error).__name__}: {error}"[:300]
            continue
        for tokens in options.tokens:
            for arm in arms_of(name, folder, tokens, options):
                left = ends - time.monotonic()
                if left < LEAST:
                    report.facts[f"left out: {arm.label}"] = f"{max(left, 0):.0f} s left"
                    continue
                run = run_arm(arm, 0, min(left, options.timeout))
                describe(run)
                report.runs.append(run)
                save(report, options.out)
        if not Path(name).is_dir():
            shutil.rmtree(folder)  # the next one needs the room


def summary(report: Report, on_card: bool) -> Table:
    """A line an arm."""
    memory = VRAM if on_card else MEMORY
    rows = []
    for label in labels_of(report.runs):
        run = next(run for run in report.runs if run.label == label)
        seconds = median_of(report.runs, label, SECONDS)
        tokens = int(str(run.options["tokens"]))
        rows.append([label, number(run, memory), seconds, tokens / seconds if seconds else None, run.failure or ""])
    return Table("Published comparison", ["arm", "peak MiB", "s/step", "tokens/s", "failure"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "memory and speed beside PEFT over real models", pairs=1, steps=21, tokens=None)
    made.add_argument("--models", type=several(str), default=MODELS, help="hub ids or folders")
    made.add_argument("--tokens", type=several(int), default=(128, 512), help="a row")
    made.add_argument("--budgets", type=several(written_budget), default=("2GB", "6GB"), help="of LEMA's further arms")
    made.add_argument("--device", default="cuda", help="where layers are computed")
    made.add_argument("--dtype", default="float16", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--cache", type=Path, help="where models are fetched to (default: temporary)")
    made.add_argument("--minutes", type=float, default=180, help="to end within (default: %(default)s)")
    options = parse(made, arguments)
    report = Report("published", "The published comparison", command_line(MODULE, options), notes=list(NOTES))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        measure(report, options, options.cache or Path(temporary))
    on_card = options.device != "cpu"
    report.tables = [summary(report, on_card)]
    report.panels = [
        bars(report.runs, "Step time", "s/step", SECONDS),
        bars(report.runs, "Peak memory", "MiB", VRAM if on_card else MEMORY),
    ]
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
