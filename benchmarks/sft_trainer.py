"""The loss curve beside that of TRL's `SFTTrainer` on plain PEFT: the same rows, order and settings, in fp32.

It knows the two curves and what is claimed of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .options import command_line, common_options, parse
from .plots import Panel
from .processes import Arm, alternate, run_module
from .report import Check, Report, Table, write

MODULE = "benchmarks.sft_trainer"
LEMA, TRL = "LEMA", "TRL SFTTrainer"
WITHIN = 1e-4
NOTES = (
    "Both start from the same adapter (the same seed gives PEFT's first values to both) and see the same rows in the "
    "same order; TRL gets them in micro-batches of the same rows that LEMA runs at once.",
    "Loss is the mean over all target tokens of a step. AdamW, linear schedule with warm-up, clipping at 1.",
)


def judge(report: Report) -> None:
    """The claim, the table and the plot."""
    curves = {run.label: list(run.numbers["losses"]) for run in report.runs if run.numbers is not None}
    ours, theirs = curves.get(LEMA, []), curves.get(TRL, [])
    differences = [abs(a - b) for a, b in zip(ours, theirs)]
    whole = bool(ours) and len(ours) == len(theirs)
    worst = max(differences, default=float("nan"))
    report.checks = [
        Check(
            f"all {len(ours)} losses within {WITHIN:g} of TRL's",
            (worst <= WITHIN) if whole else None,
            f"largest difference {worst:.2e}; loss {theirs[0]:.4f} -> {theirs[-1]:.4f}" if whole else "",
        )
    ]
    shown = [n for n in range(len(ours)) if n % 5 == 0 or n == len(ours) - 1]
    rows = [(n + 1, f"{ours[n]:.6f}", f"{theirs[n]:.6f}", f"{differences[n]:.1e}") for n in shown if whole]
    report.tables = [Table("Loss", ("step", LEMA, TRL, "difference"), rows)]
    series = {name: {n + 1: value for n, value in enumerate(losses)} for name, losses in curves.items()}
    report.panels = [
        Panel("Loss", "step", "loss", series),
        Panel("Difference", "step", "absolute", {"difference": {n + 1: d for n, d in enumerate(differences)}}),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train twice and write the report."""
    made = common_options(MODULE, "SmolLM2-135M fp32: the loss curve beside TRL's", pairs=1, steps=50)
    made.set_defaults(tokens=128)
    made.add_argument("--folder", type=Path, help="another model with a chat template (default: SmolLM2-135M-Instruct)")
    made.add_argument("--data", type=Path, default=Path("src/lema/data/questions.jsonl"))
    options = parse(made, arguments)
    folder = options.folder or Path(run_module("benchmarks.demo_folder"))
    settings = {"data": str(options.data), "steps": options.steps, "tokens": options.tokens}
    arms = [
        Arm(label, kind, folder, settings, module="benchmarks.sft_arms")
        for label, kind in ((LEMA, "lema"), (TRL, "trl"))
    ]
    report = Report(
        "sft_trainer", "Loss curve beside TRL's SFTTrainer: SmolLM2-135M, fp32, CPU", command_line(MODULE, options)
    )
    report.runs = list(alternate(arms, options.pairs, options.timeout))
    judge(report)
    report.notes = list(NOTES)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
