"""What the runs on a card say: ratios, claims, tables and the plot.

It knows labels and keys of the runs; it knows nothing of stages or of the time there was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .gpu_checks import TOLERANCE
from .plots import Panel
from .processes import Run
from .report import Check, Report, Table, loss_check, median_of, number, ratio, within
from .tables import ABOVE_IMPORTS, ARMS_ALIKE, EVICTED, MEMORY, RANDOM_WEIGHTS, SECONDS, bars, labels_of, within_budget

CHECKPOINTING, PLAIN, ALL = "PEFT+checkpointing", "PEFT", "LEMA, all on the card"
VRAM = "device_peak_mib"
FLAT_MIB = {"device": 1.0, "host": 16.0}
"""Growth over the steps of the flat check that is still called flat."""
NOTES = (
    "VRAM peak: most bytes of tensors at once, by torch's allocator; VRAM held: what the allocator took for them. The "
    "CUDA context is in neither.",
    "Bound: the largest of three times, each from numbers of this run: floating point operations of the step over the "
    "measured rate of matrix products, bytes copied to the card over the measured rate of the link, bytes read over "
    "the measured rate of the disk. `LEMA, all on the card` is the same step without transfers, recomputing as well.",
    "Stall: seconds a step in which the host waited for weights. The card's own idle time is in the trace.",
    "Weights of LEMA come from RAM as far as `ram_budget=auto` lets them, else from the disk.",
    ABOVE_IMPORTS + " The device's context is made before.",
    ARMS_ALIKE,
    EVICTED.replace("each arm", "each arm of LEMA"),
    RANDOM_WEIGHTS,
)


def bounds(run: Run, limits: dict[str, Any]) -> dict[str, Any]:
    """Least seconds of the run's step by arithmetic, link and disk."""
    operations = number(run, "plan.estimated_compute_seconds")
    if operations is None or not limits:
        return {}
    link, disk = limits["link_bytes_per_s"], limits["disk_bytes_per_s"]
    least = {
        "compute": operations,
        "link": (number(run, "copied_bytes_per_step") or 0.0) / link if link else 0.0,
        "disk": (number(run, "engine_bytes_per_step") or 0.0) / disk,
    }
    return {"bounds": least, "bound_seconds": max(least.values()), "bound_by": max(least, key=lambda key: least[key])}


def judge(report: Report, on_card: bool, tokens: int) -> None:
    """Ratios, claims, tables and facts of the runs there are.

    Args:
        on_card: False where the CPU stood in for it.
        tokens: of a step.
    """
    runs = report.runs
    report.ratios, report.checks = [], []
    for label in labels_of(runs):
        model, _, arm = label.partition(": ")
        if not arm.startswith("LEMA"):
            continue
        for other in (CHECKPOINTING, PLAIN):
            if median_of(runs, f"{model}: {other}", SECONDS) is not None:
                report.ratios.append(ratio(runs, f"{label} / {other}, step time", SECONDS, label, f"{model}: {other}"))
                if on_card:
                    report.ratios.append(ratio(runs, f"{label} / {other}, VRAM", VRAM, label, f"{model}: {other}"))
        if median_of(runs, f"{model}: {ALL}", SECONDS) is not None and arm != ALL:
            report.ratios.append(
                ratio(runs, f"{label} / all on the card, step time", SECONDS, label, f"{model}: {ALL}")
            )
        report.ratios.append(within(runs, f"{label}, step time / bound", label, SECONDS, "bound_seconds"))
        if median_of(runs, label, "vram_budget_bytes") is not None:
            report.checks.append(within_budget(runs, label, f"{label}, VRAM", VRAM, "vram_budget_bytes"))
    for model in dict.fromkeys(label.partition(": ")[0] for label in labels_of(runs) if ": " in label):
        agreed = loss_check([run for run in runs if run.label.startswith(f"{model}: ")])
        report.checks.append(Check(f"{model}: {agreed.claim}", agreed.holds, agreed.detail))
    report.checks += [*_parity(runs), *_flat(runs)]
    report.tables = [_arms_table(runs, tokens)]
    for run in runs:
        if trace := (run.numbers or {}).get("trace"):
            lanes = ", ".join(f"{lane} {trace[f'{lane}_seconds']:.3f}" for lane in ("compute", "copy", "disk", "wait"))
            report.facts[f"trace of `{run.label}`"] = (
                f"`{trace['file']}` (for ui.perfetto.dev): step {trace['step_seconds']:.3f} s, busy seconds: {lanes}"
            )


def _parity(runs: Sequence[Run]) -> list[Check]:
    claim = f"gradients in fp32 differ from PEFT's by at most {TOLERANCE:g} of their norm"
    checks = []
    for run in runs:
        if run.label == "parity" and run.numbers is None:
            checks.append(Check(claim, None, "the check did not finish"))
        elif run.label == "parity" and run.numbers is not None:
            for name, one in run.numbers["variants"].items():
                worst = one["largest_difference"]
                detail = f"{worst:.2g}; {one['same_bits']} of {one['tensors']} tensors to the bit"
                checks.append(Check(f"{name}: {claim}", worst <= TOLERANCE, detail))
    return checks


def _flat(runs: Sequence[Run]) -> list[Check]:
    checks = []
    for run in runs:
        for place, allowed in FLAT_MIB.items() if run.label == "flat" else ():
            grown = number(run, f"{place}_growth_mib")
            steps = (run.numbers or {}).get("steps", [0])[-1]
            claim = f"memory of the {place} is flat over {steps} steps (grows by at most {allowed:g} MiB)"
            if run.numbers is None or grown is not None:
                checks.append(
                    Check(
                        claim, None if grown is None else grown <= allowed, "" if grown is None else f"{grown:.2f} MiB"
                    )
                )
    return checks


def _arms_table(runs: Sequence[Run], tokens: int) -> Table:
    head = ["arm", "VRAM peak MiB", "predicted", "VRAM held", "host MiB above imports", "s/step", "tokens/s", "stall s",
            "copied GB", "read GB", "bound s", "by"]  # fmt: skip
    rows = []
    for run in runs:
        seconds = number(run, SECONDS)
        if ": " not in run.label:
            continue
        copied, read = number(run, "copied_bytes_per_step"), number(run, "engine_bytes_per_step")
        rows.append(
            [run.label, number(run, VRAM), number(run, "plan.predicted_device_mib"), number(run, "device_reserved_mib"),
             number(run, "above_floor_mib"), seconds, tokens / seconds if seconds else None,
             number(run, "waiting_seconds"), None if copied is None else copied / 1e9,
             None if read is None else read / 1e9, number(run, "bound_seconds"), (run.numbers or {}).get("bound_by")]
        )  # fmt: skip
    return Table("Arms", head, rows)


def panels(runs: Sequence[Run], on_card: bool) -> list[Panel]:
    """The plot."""
    arms = [label for label in labels_of(runs) if ": " in label]
    memory = VRAM if on_card else MEMORY
    drawn = [bars(runs, "Step time", "s/step", SECONDS, arms), bars(runs, "Peak memory", "MiB", memory, arms)]
    for run in runs:
        if run.label == "flat" and run.numbers is not None:
            series = {
                name: dict(zip(run.numbers["steps"], run.numbers[key], strict=True))
                for name, key in (("host", "host_mib"), ("device", "device_mib"))
                if run.numbers[key][0] is not None
            }
            drawn.append(Panel("Memory of a small model over steps", "step", "MiB", series))
    return drawn
