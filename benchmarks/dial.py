"""One dial: the same step at one memory budget after another, from streaming all to keeping all, and plain PEFT.

It knows the budgets and what is claimed of them; what to keep at which budget is the plan's own business.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import machine
from .folders import ITEM_BYTES, SMOLLM2, evict, shape_folder
from .options import command_line, common_options, model_options, name_of, parse, several, title_of, written_budget
from .plots import Panel
from .processes import Arm, Option, alternate
from .report import Report, loss_check, median_of, ratio, within, write
from .tables import (
    ABOVE_IMPORTS,
    ARMS_ALIKE,
    EVICTED,
    MAPPED,
    MEMORY,
    PLAN_SEES,
    RANDOM_WEIGHTS,
    SECONDS,
    as_predicted,
    never_slower,
    predictions,
    within_budget,
)

MODULE = "benchmarks.dial"
PLAIN = "PEFT"
DEFAULT = ("0.9GB", "1.3GB", "2GB", "3GB", "4.5GB", "auto")
NOTES = (
    "A budget counts from the import floor, as LEMA's `ram_budget` does; `auto` is what was free, less a margin. The "
    "plan decides everything else: layers kept in RAM, activations kept, loss chunks, the way of the head.",
    "A budget that the plan refuses is listed under failures with the plan's own words.",
    ABOVE_IMPORTS,
    ARMS_ALIKE,
    MAPPED,
    EVICTED,
)


def label(budget: str) -> str:
    """Of the arm with this budget."""
    return f"LEMA, {budget}"


def judge(report: Report, budgets: Sequence[str]) -> None:
    """Ratios, claims, table and plot."""
    runs, largest = report.runs, label(budgets[-1])
    report.ratios = [
        ratio(runs, f"step time, largest budget ({budgets[-1]}) / PEFT", SECONDS, largest, PLAIN),
        ratio(runs, f"peak memory, largest budget ({budgets[-1]}) / PEFT", MEMORY, largest, PLAIN),
        ratio(runs, f"step time, smallest budget ({budgets[0]}) / PEFT", SECONDS, label(budgets[0]), PLAIN),
        ratio(runs, f"peak memory, smallest budget ({budgets[0]}) / PEFT", MEMORY, label(budgets[0]), PLAIN),
        *(
            within(runs, f"peak measured / predicted, {budget}", label(budget), MEMORY, "plan.predicted_mib")
            for budget in budgets
        ),
    ]
    report.checks = [within_budget(runs, label(budget), budget) for budget in budgets]
    report.checks += [as_predicted(runs, label(budget), budget) for budget in budgets]
    report.checks.append(never_slower(runs, [label(budget) for budget in budgets]))
    report.checks.append(loss_check(runs))
    report.tables = [predictions(runs, "Budget, prediction and measurement")]
    points = {budget: median_of(runs, label(budget), "ram_budget_bytes") for budget in budgets}
    known = {budget: round(size / 2**20) for budget, size in points.items() if size is not None}
    named = {"measured": MEMORY, "predicted": "plan.predicted_mib"}
    memory = {
        name: {x: median_of(runs, label(budget), key) for budget, x in known.items()} for name, key in named.items()
    }
    memory["budget"] = {x: float(x) for budget, x in known.items() if budget != "auto"}
    times = {x: median_of(runs, label(budget), SECONDS) for budget, x in known.items()}
    peft = {SECONDS: median_of(runs, PLAIN, SECONDS), MEMORY: median_of(runs, PLAIN, MEMORY)}
    levels = {key: {PLAIN: value} if value is not None else {} for key, value in peft.items()}
    report.panels = [
        Panel("Peak memory above imports", "budget, MiB", "MiB", memory, levels[MEMORY], True),
        Panel("Step time", "budget, MiB", "s/step", {"LEMA": times}, levels[SECONDS], True),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "step time and memory over the memory budget", pairs=2, steps=4)
    model_options(made, "1.7b", SMOLLM2)
    made.add_argument("--dtype", choices=list(ITEM_BYTES), default="bfloat16", help="(default: %(default)s)")
    made.set_defaults(rank=8)  # at rank 16 the adapters with their optimizer leave too little of the smallest budget
    made.add_argument(
        "--budgets", type=several(written_budget), default=DEFAULT, help="smallest first; 'auto': all free"
    )
    options = parse(made, arguments)
    settings: dict[str, Option] = {
        "dtype": options.dtype, "tokens": options.tokens, "rank": options.rank, "steps": options.steps
    }  # fmt: skip
    report = Report(
        name_of("dial", options.shape, "1.7b"),
        f"One dial: {title_of(options.shape)}, {options.dtype}, CPU",
        command_line(MODULE, options),
    )
    with shape_folder(options.shape, options.folder, options.keep, options.dtype) as folder:
        report.facts[PLAN_SEES] = machine.ask(folder)["words"]
        arms = [Arm(label(b), "lema", folder, {**settings, "set": [f"ram_budget={b}"]}) for b in options.budgets]
        arms.append(Arm(PLAIN, "peft", folder, settings))
        report.runs = list(alternate(arms, options.pairs, options.timeout, lambda arm: evict(arm.folder)))
    judge(report, options.budgets)
    report.notes = [*NOTES, *([] if options.shape == SMOLLM2 else [RANDOM_WEIGHTS])]
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
