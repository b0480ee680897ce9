"""Small and fast: SmolLM2-135M in fp32, LEMA streaming beside PEFT with and without gradient checkpointing.

It knows the arms and the targets; it does not know how an arm measures itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .processes import Arm, alternate, run_module
from .report import Report, check_common, command_line, common_options, loss_note, ratio, write

MODULE = "benchmarks.small"
LEMA, CHECKPOINTING, PLAIN = "LEMA", "PEFT+checkpointing", "PEFT"
MEMORY_TARGET, TIME_TARGET = 0.45, 1.00
NOTES = (
    "Above imports: highest resident set of the process, less its highest resident set right after importing torch, "
    "transformers, the model's class and peft. Mapped file pages count; importing lema counts for LEMA.",
    "All arms: batch 1, LoRA on every linear layer, AdamW, the same token ids, no data loading. Only LEMA cuts its "
    "loss into chunks, a setting the PEFT arms do not have.",
    "The first step of an arm is not timed. Ratios are medians over pairs; the arms of a pair run one after the other, "
    "in this and the reverse order by turns.",
    "Where transformers leaves weights mapped from their file, those pages are in PEFT's resident set although the "
    "kernel could drop them under pressure and read them again; the columns at end tell them from anonymous memory.",
    "The resident set does not show page cache that reading the weights may leave behind, in any arm.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "SmolLM2-135M fp32: memory and step time beside PEFT", pairs=5, steps=6)
    made.add_argument("--chunk", type=int, default=64, help="LEMA: target positions a piece of the loss")
    options = made.parse_args(arguments)
    check_common(made, options)
    folder = Path(run_module("benchmarks.demo_folder"))
    settings = {"dtype": "float32", "tokens": options.tokens, "rank": options.rank, "steps": options.steps}
    arms = [
        Arm(LEMA, "lema", folder, {**settings, "chunk": options.chunk}),
        Arm(CHECKPOINTING, "peft_checkpointing", folder, settings),
        Arm(PLAIN, "peft", folder, settings),
    ]
    report = Report("small", "Small and fast: SmolLM2-135M, fp32, CPU", command_line(MODULE, options))
    report.runs = list(alternate(arms, options.pairs, options.timeout))
    memory, seconds = "above_floor_mib", "median_step_seconds"
    report.ratios = [
        ratio(report.runs, "peak memory, LEMA / PEFT+checkpointing", memory, LEMA, CHECKPOINTING, MEMORY_TARGET),
        ratio(report.runs, "step time, LEMA / PEFT+checkpointing", seconds, LEMA, CHECKPOINTING, TIME_TARGET),
        ratio(report.runs, "peak memory, LEMA / PEFT", memory, LEMA, PLAIN),
        ratio(report.runs, "step time, LEMA / PEFT", seconds, LEMA, PLAIN),
    ]
    report.notes = [*NOTES, loss_note(report.runs)]
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
