"""What several benchmarks say of their runs: panels of bars, tables of predictions, and the notes that go with them.

It knows keys of the arms' numbers; it does not know which arms there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .plots import Panel
from .processes import Run
from .report import Check, Table, median_of, number, ratio

ABOVE_IMPORTS = (
    "Above imports: highest resident set of the process, less its highest resident set right after importing torch, "
    "transformers, the model's class and peft. Mapped file pages count; importing lema counts for LEMA."
)
ARMS_ALIKE = (
    "All arms: LoRA on every linear layer, AdamW, the same token ids, no data loading. The first step of an arm is "
    "not timed. Ratios are medians over pairs; the arms of a pair run one after the other, in this and the reverse "
    "order by turns. Only LEMA cuts its loss into chunks, a setting the PEFT arms do not have."
)
MAPPED = (
    "Where transformers leaves weights mapped from their file, those pages are in PEFT's resident set although the "
    "kernel could drop them under pressure and read them again; the columns at end tell them from anonymous memory."
)
RANDOM_WEIGHTS = "Random weights: only the shape matters for these figures."
EVICTED = (
    "Before each arm the weights are dropped from this machine's page cache. Below a virtual machine the host may "
    "still hold them, so the disk can look faster than it is."
)
PLAN_SEES = "this machine as the plan sees it, measured at the beginning of this run"
SECONDS, MEMORY = "median_step_seconds", "above_floor_mib"


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Every label once, in the order of the first pair."""
    return list(dict.fromkeys(run.label for run in runs))


def bars(runs: Sequence[Run], title: str, unit: str, key: str, labels: Sequence[str] | None = None) -> Panel:
    """Medians of one number, a bar an arm."""
    shown = labels_of(runs) if labels is None else labels
    return Panel(title, "", unit, {"median": {label: median_of(runs, label, key) for label in shown}})


def arm_bars(runs: Sequence[Run], labels: Sequence[str] | None = None) -> list[Panel]:
    """Step time and memory of every arm."""
    return [
        bars(runs, "Step time", "s/step", SECONDS, labels),
        bars(runs, "Peak memory above imports", "MiB", MEMORY, labels),
    ]


def predictions(runs: Sequence[Run], title: str) -> Table:
    """Every run that a plan was asked about: its decisions, and the predicted peak beside the measured one."""
    head = ["arm", "pair", "budget MiB", "predicted MiB", "measured MiB", "measured / predicted", "in RAM", "on disk",
            "activations kept", "head", "s/step", "estimated s"]  # fmt: skip
    rows = []
    for run in runs:
        plan = (run.numbers or {}).get("plan")
        if plan is None:
            continue
        budget, measured, predicted = number(run, "ram_budget_bytes"), number(run, MEMORY), plan["predicted_mib"]
        rows.append(
            [run.label, run.pair + 1, None if budget is None else budget / 2**20, predicted, measured,
             None if measured is None else measured / predicted, plan["in_ram"], plan["from_disk"],
             plan["keep_activations"], plan["head"], number(run, SECONDS), plan["estimated_seconds"]]
        )  # fmt: skip
    return Table(title, head, rows)


def within_budget(
    runs: Sequence[Run], label: str, name: str, peak: str = MEMORY, budget: str = "ram_budget_bytes"
) -> Check:
    """Whether an arm's peak, in MiB, stayed within its budget, in bytes, every time."""
    own = [run for run in runs if run.label == label]
    held = [(number(run, peak), number(run, budget)) for run in own]
    shares = [most * 2**20 / limit for most, limit in held if most is not None and limit]
    claim = f"{name}: the peak is within the budget in every run"
    if not own or len(shares) < len(own):
        return Check(claim, None, "an arm did not finish")
    return Check(claim, max(shares) <= 1, f"at most {max(shares):.1%} of it")


def as_predicted(runs: Sequence[Run], label: str, name: str, allowed: float = 0.05) -> Check:
    """Whether the median of an arm's peaks is what the plan predicted, to within a share."""
    claim = f"{name}: the peak is within {allowed:.0%} of the plan's prediction"
    measured, predicted = median_of(runs, label, MEMORY), median_of(runs, label, "plan.predicted_mib")
    if measured is None or not predicted:
        return Check(claim, None, "no run finished")
    return Check(claim, abs(measured / predicted - 1) <= allowed, f"{measured / predicted:.3f} of it")


def never_slower(runs: Sequence[Run], labels: Sequence[str], allowed: float = 0.03) -> Check:
    """Whether steps of each arm take no longer than those of the one before it, but for what timing cannot tell."""
    claim = f"more memory is never slower (medians over pairs, {allowed:.0%} for noise)"
    pairs = [(ratio(runs, "", SECONDS, more, less).median, more, less) for less, more in pairwise(labels)]
    known = [(value, more, less) for value, more, less in pairs if value is not None]
    if not known:
        return Check(claim, None, "fewer than two arms finished")
    worst, more, less = max(known)
    return Check(claim, worst <= 1 + allowed, f"at most {worst:.3f}, {more} over {less}")
