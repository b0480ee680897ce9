"""Peak memory over models and batch shapes: LEMA as it is and with a budget, PEFT with and without checkpointing.

It knows the cases and the budgets; it does not know how an arm measures itself.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .folders import evict, model_folder
from .make_model import NAMES, PRESETS
from .options import command_line, common_options, parse, several, written_budget
from .plots import Panel
from .processes import Arm, Option, alternate, run_module
from .report import Check, Report, loss_check, median_of, ratio, within, write
from .tables import (
    ABOVE_IMPORTS,
    ARMS_ALIKE,
    EVICTED,
    MAPPED,
    MEMORY,
    PLAN_SEES,
    RANDOM_WEIGHTS,
    predictions,
    within_budget,
)

MODULE = "benchmarks.memory"
LEMA, BUDGET, CHECKPOINTING, PLAIN = "LEMA", "LEMA, budget", "PEFT+checkpointing", "PEFT"
NOTES = (
    ABOVE_IMPORTS,
    ARMS_ALIKE,
    MAPPED,
    EVICTED,
    "LEMA without a budget makes no plan. Its prediction is what a plan for the same decisions says, asked afterwards; "
    "the guard that gives idle heap back works only with a plan, so the measured peak may be above it.",
    "The models of given shapes have random weights: " + RANDOM_WEIGHTS,
)


@dataclass(frozen=True)
class Case:
    """One model and batch shape."""

    model: str
    """'smollm2', or the name of a shape."""
    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """`smollm2:4x128`: model, rows, tokens."""
        model, _, rest = text.partition(":")
        rows, _, tokens = rest.partition("x")
        if model not in ("smollm2", *PRESETS):
            raise ValueError(model)
        return cls(model, int(rows), int(tokens))

    def __str__(self) -> str:
        return f"{self.model}:{self.batch}x{self.tokens}"

    @property
    def name(self) -> str:
        """In the report."""
        model = "SmolLM2-135M" if self.model == "smollm2" else NAMES[self.model]
        return f"{model} {self.batch}x{self.tokens}"


def case(text: str) -> Case:
    """A case, for the command line."""
    return Case.parse(text)


DEFAULT = tuple(Case("smollm2", batch, tokens) for tokens in (128, 512) for batch in (1, 4)) + (Case("1.7b", 1, 512),)


def arms_of(one: Case, folder: Path, options: argparse.Namespace, budget: str) -> list[Arm]:
    """The four arms of a case."""
    settings: dict[str, Option] = {
        "dtype": "float32" if one.model == "smollm2" else "bfloat16",
        "tokens": one.tokens,
        "batch": one.batch,
        "rank": options.rank,
        "steps": options.steps,
    }
    return [
        Arm(f"{one.name}: {LEMA}", "lema", folder, {**settings, "predict": 1}),
        Arm(f"{one.name}: {BUDGET}", "lema", folder, {**settings, "set": [f"ram_budget={budget}"]}),
        Arm(f"{one.name}: {CHECKPOINTING}", "peft_checkpointing", folder, settings),
        Arm(f"{one.name}: {PLAIN}", "peft", folder, settings),
    ]


def judge(report: Report, cases: Sequence[Case]) -> None:
    """Ratios, claims, tables and plot of the runs there are."""
    runs = report.runs
    for one in cases:
        lema, budget, checkpointing, plain = (f"{one.name}: {arm}" for arm in (LEMA, BUDGET, CHECKPOINTING, PLAIN))
        report.ratios += [
            ratio(runs, f"{one.name}: peak, LEMA / PEFT+checkpointing", MEMORY, lema, checkpointing),
            ratio(runs, f"{one.name}: peak, LEMA with the budget / PEFT+checkpointing", MEMORY, budget, checkpointing),
            ratio(runs, f"{one.name}: peak, LEMA / PEFT", MEMORY, lema, plain),
            within(runs, f"{one.name}: measured / predicted, LEMA with the budget", budget, MEMORY,
                   "plan.predicted_mib"),
        ]  # fmt: skip
        own = [run for run in runs if run.label.startswith(f"{one.name}: ")]
        agreed = loss_check(own)
        report.checks.append(Check(f"{one.name}: {agreed.claim}", agreed.holds, agreed.detail))
        report.checks.append(within_budget(runs, budget, one.name))
    report.tables = [predictions(runs, "Predicted and measured peaks")]
    series = {
        arm: {one.name: median_of(runs, f"{one.name}: {arm}", MEMORY) for one in cases}
        for arm in (LEMA, BUDGET, CHECKPOINTING, PLAIN)
    }
    predicted = {one.name: median_of(runs, f"{one.name}: {BUDGET}", "plan.predicted_mib") for one in cases}
    report.panels = [
        Panel("Peak memory above imports", "", "MiB", series),
        Panel("LEMA with the budget", "", "MiB", {"measured": series[BUDGET], "predicted": predicted}),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "peak memory over models and batch shapes", pairs=1, steps=3, tokens=None)
    made.add_argument(
        "--cases", type=several(case), default=DEFAULT, help="MODEL:ROWSxTOKENS,...; smollm2 or a shape's name"
    )
    made.add_argument(
        "--budget", type=written_budget, default="600MB", help="of LEMA for SmolLM2 (default: %(default)s)"
    )
    made.add_argument(
        "--shape-budget", type=written_budget, default="1300MB", help="of LEMA for the others (default: %(default)s)"
    )
    options = parse(made, arguments)
    report = Report("memory", "Peak memory over models and batch shapes, CPU", command_line(MODULE, options))
    with contextlib.ExitStack() as stack:
        folders = {
            model: Path(run_module("benchmarks.demo_folder"))
            if model == "smollm2"
            else stack.enter_context(model_folder(model))
            for model in dict.fromkeys(one.model for one in options.cases)
        }
        report.facts[PLAN_SEES] = machine.ask(next(iter(folders.values())))["words"]
        for one in options.cases:
            budget = options.budget if one.model == "smollm2" else options.shape_budget
            arms = arms_of(one, folders[one.model], options, budget)
            report.runs += alternate(arms, options.pairs, options.timeout, lambda arm: evict(arm.folder))
    judge(report, options.cases)
    report.notes = list(NOTES)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
