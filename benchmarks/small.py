"""Small and fast: SmolLM2-135M in fp32, LEMA streaming beside PEFT with and without gradient checkpointing.

It knows the arms and the targets; it does not know how an arm measures itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .options import command_line, common_options, parse
from .processes import Arm, alternate, run_module
from .report import Report, loss_check, ratio, write
from .tables import ABOVE_IMPORTS, ARMS_ALIKE, MAPPED, arm_bars

MODULE = "benchmarks.small"
LEMA, BUDGET, CHECKPOINTING, PLAIN = "LEMA", "LEMA budget", "PEFT+checkpointing", "PEFT"
MEMORY_TARGET, BUDGET_TARGET, TIME_TARGET = 0.32, 0.45, 1.00
NOTES = (
    ABOVE_IMPORTS,
    ARMS_ALIKE,
    MAPPED,
    "The resident set does not show page cache that reading the weights may leave behind, in any arm.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "SmolLM2-135M fp32: memory and step time beside PEFT", pairs=5, steps=6)
    made.add_argument("--chunk", type=int, default=0, help="LEMA: target positions a piece of the loss; 0: its own")
    made.add_argument("--budget", default="600MB", help="ram_budget of LEMA's second arm")
    made.add_argument("--folder", type=Path, help="another model, stored in fp32 (default: SmolLM2-135M)")
    options = parse(made, arguments)
    folder = options.folder or Path(run_module("benchmarks.demo_folder"))
    settings = {"dtype": "float32", "tokens": options.tokens, "rank": options.rank, "steps": options.steps}
    arms = [
        Arm(LEMA, "lema", folder, {**settings, "chunk": options.chunk}),
        Arm(BUDGET, "lema", folder, {**settings, "set": [f"ram_budget={options.budget}"]}),
        Arm(CHECKPOINTING, "peft_checkpointing", folder, settings),
        Arm(PLAIN, "peft", folder, settings),
    ]
    report = Report("small", "Small and fast: SmolLM2-135M, fp32, CPU", command_line(MODULE, options))
    report.runs = list(alternate(arms, options.pairs, options.timeout))
    memory, seconds = "above_floor_mib", "median_step_seconds"
    report.ratios = [
        ratio(report.runs, "peak memory, LEMA / PEFT+checkpointing", memory, LEMA, CHECKPOINTING, MEMORY_TARGET),
        ratio(report.runs, "step time, LEMA / PEFT+checkpointing", seconds, LEMA, CHECKPOINTING, TIME_TARGET),
        ratio(
            report.runs, "peak memory, LEMA budget / PEFT+checkpointing", memory, BUDGET, CHECKPOINTING, BUDGET_TARGET
        ),
        ratio(report.runs, "step time, LEMA budget / PEFT+checkpointing", seconds, BUDGET, CHECKPOINTING, TIME_TARGET),
        ratio(report.runs, "peak memory, LEMA / PEFT", memory, LEMA, PLAIN),
        ratio(report.runs, "step time, LEMA / PEFT", seconds, LEMA, PLAIN),
    ]
    report.checks = [loss_check(report.runs)]
    report.panels = arm_bars(report.runs)
    report.notes = list(NOTES)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
