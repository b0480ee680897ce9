"""Defaults beside PEFT with and without gradient checkpointing: SmolLM2-135M in fp32, or another shape and type.

It knows the arms and the targets; it does not know how an arm measures itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .folders import ITEM_BYTES, SMOLLM2, evict, shape_folder
from .make_model import PRESETS
from .options import command_line, common_options, parse, title_of
from .processes import Arm, alternate
from .report import Report, loss_check, ratio, write
from .tables import ABOVE_IMPORTS, ARMS_ALIKE, EVICTED, MAPPED, RANDOM_WEIGHTS, arm_bars

MODULE = "benchmarks.small"
LEMA, EXACT, BUDGET = "LEMA", "LEMA, exact loss", "LEMA budget"
CHECKPOINTING, PLAIN = "PEFT+checkpointing", "PEFT"
MEMORY_TARGET, BUDGET_TARGET, TIME_TARGET, CHUNKED_TARGET = 0.32, 0.45, 1.00, 1.02
NOTES = (
    ABOVE_IMPORTS,
    ARMS_ALIKE,
    MAPPED,
    "The resident set does not show page cache that reading the weights may leave behind, in any arm.",
    f"{LEMA} has default settings: nothing is set but the model, its type, the adapter and the length. {EXACT} has "
    "`loss_chunk_size: exact` beside, which makes all logits at once.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "memory and step time with defaults beside PEFT", pairs=5, steps=6)
    made.add_argument("--shape", choices=[SMOLLM2, *PRESETS], default=SMOLLM2, help="(default: %(default)s)")
    made.add_argument("--dtype", choices=list(ITEM_BYTES), default="float32", help="(default: %(default)s)")
    made.add_argument("--budget", default="600MB", help="ram_budget of another arm of LEMA; '': none")
    made.add_argument("--folder", type=Path, help="the model's folder; one of random weights is made if it is empty")
    made.add_argument("--keep", action="store_true", help="do not delete a model made by this run")
    options = parse(made, arguments)
    settings = {"dtype": options.dtype, "tokens": options.tokens, "rank": options.rank, "steps": options.steps}
    own = options.shape == SMOLLM2
    named = title_of(options.shape)
    report = Report(
        "small" if own else f"small_{options.shape}",
        f"Small and fast: {named}, {options.dtype}, CPU",
        command_line(MODULE, options),
    )
    with shape_folder(options.shape, options.folder, options.keep, options.dtype) as folder:
        arms = [
            Arm(LEMA, "lema", folder, settings),
            Arm(EXACT, "lema", folder, {**settings, "set": ["loss_chunk_size=exact"]}),
            Arm(CHECKPOINTING, "peft_checkpointing", folder, settings),
            Arm(PLAIN, "peft", folder, settings),
        ]
        if options.budget:
            arms.insert(2, Arm(BUDGET, "lema", folder, {**settings, "set": [f"ram_budget={options.budget}"]}))
        before = None if own else lambda arm: evict(arm.folder)
        report.runs = list(alternate(arms, options.pairs, options.timeout, before))
    memory, seconds = "above_floor_mib", "median_step_seconds"
    report.ratios = [
        ratio(report.runs, "peak memory, LEMA / PEFT+checkpointing", memory, LEMA, CHECKPOINTING, MEMORY_TARGET),
        ratio(report.runs, "step time, LEMA / PEFT+checkpointing", seconds, LEMA, CHECKPOINTING, TIME_TARGET),
        ratio(report.runs, "step time, LEMA / the same with exact loss", seconds, LEMA, EXACT, CHUNKED_TARGET),
        ratio(report.runs, "peak memory, LEMA / the same with exact loss", memory, LEMA, EXACT),
        ratio(report.runs, "peak memory, LEMA / PEFT", memory, LEMA, PLAIN),
        ratio(report.runs, "step time, LEMA / PEFT", seconds, LEMA, PLAIN),
    ]
    if options.budget:
        beside = "LEMA budget / PEFT+checkpointing"
        report.ratios += [
            ratio(report.runs, f"peak memory, {beside}", memory, BUDGET, CHECKPOINTING, BUDGET_TARGET),
            ratio(report.runs, f"step time, {beside}", seconds, BUDGET, CHECKPOINTING, TIME_TARGET),
        ]
    report.checks = [loss_check(report.runs)]
    report.panels = arm_bars(report.runs)
    report.notes = [*NOTES, *(() if own else (EVICTED, RANDOM_WEIGHTS))]
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
