"""The proof: SmolLM2-135M learns the [LEMA_REPLY] format by streaming, beside plain PEFT, and loses nothing by merging.

It knows the parts, in what order they come, and what is claimed of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import OUT, command_line
from .plots import Panel
from .processes import ROOT, Arm, Run, describe, run_arm, run_module
from .proof_arms import HELD_OUT, RAM_BUDGET, TRAIN
from .report import Check, Report, Table, write

MODULE = "benchmarks.proof"
PARTS = {
    "train-lema": "LEMA trains", "train-peft": "PEFT trains", "ask-lema": "LEMA answers", "ask-peft": "PEFT answers",
    "merge": "LEMA merges",
}  # fmt: skip
STRICT, SAME_CURVE = 0.99, 0.01
NOTES = (
    "Training questions and held-out questions have none in common; where a category has enough facts, no fact either.",
    "A reply passes if it is exactly in the format's grammar, from the first character to the last. An answer is right "
    "if its words, in one plain form, stand in a row in the Answer field, or in the whole reply where there is none. "
    "Questions that cannot be settled are not counted as right or wrong.",
    "Asked plainly: the question alone through the base model's own chat template. All answers are greedy.",
    "PEFT's arm sees the same rows in the same order with the same settings, the model whole in memory; its answers "
    "come from plain transformers. They go on until the model ends them, and text after the closing tag counts against "
    "them; LEMA's end at the tag.",
    f"LEMA trains with ram_budget={RAM_BUDGET}: its layers stream from disk.",
)


def judge(report: Report, numbers: Mapping[str, dict[str, Any]]) -> None:
    """Claims, tables and plots."""
    arms = {**_of(numbers, "ask-lema", "arms"), **_of(numbers, "ask-peft", "arms")}
    ours = {name: list(_of(numbers, part, "losses")) for part, name in (("train-lema", "LEMA"), ("train-peft", "PEFT"))}
    report.checks = [*_checks_of_answers(arms, numbers), *_checks_of_curves(ours), *_checks_of_merge(numbers)]
    categories = list(next(iter(arms.values()))["categories"]) if arms else []
    rows = [("in the format", *(_shown(arm["strict"]) for arm in arms.values()))]
    rows += [("right answers", *(_shown(arm["right"]) for arm in arms.values()))]
    rows += [(name, *(_shown(arm["categories"].get(name)) for arm in arms.values())) for name in categories]
    rows += [("unsettled: says Low", *(_shown(arm["unsettled"]["says_low"]) for arm in arms.values()))]
    report.tables = [Table("Held-out questions, greedy", ("", *arms), rows)]
    report.panels = [
        Panel("Loss", "step", "loss", {n: dict(enumerate(losses, 1)) for n, losses in ours.items() if losses}),
        Panel(
            "Right answers", "", "share",
            {name: {c: arm["categories"][c]["share"] for c in categories} for name, arm in arms.items()},
        ),
    ]  # fmt: skip
    trained = numbers.get("train-lema", {})
    if trained.get("losses"):
        report.facts["LEMA's training"] = (
            f"{len(trained['losses'])} steps, {trained['tokens']:,} tokens, {trained['bytes_read'] / 1e9:.1f} GB read "
            f"from disk, {trained['step_seconds'] / len(trained['losses']):.2f} s a step, "
            f"peak resident set {trained['peak_bytes'] / 2**20:.0f} MiB"
        )


def _checks_of_answers(arms: Mapping[str, Any], numbers: Mapping[str, dict[str, Any]]) -> list[Check]:
    asked = _of(numbers, "ask-lema", "questions")
    base = next((arm for name, arm in arms.items() if name.startswith("base") and arm["strict"]), None)
    plain = next((arm for arm in arms.values() if not arm["strict"]), None)
    lema = next((arm for name, arm in arms.items() if name.startswith("adapter")), None)
    peft, moved = arms.get("PEFT adapter"), arms.get("LEMA's adapter in PEFT")
    found = [Check("at least 300 held-out questions", asked >= 300 if asked else None, str(asked))]
    for arm, claim, holds in (
        (base, "the base model keeps the format in at most 1% of its replies", lambda share: share <= 0.01),
        (lema, "the adapter keeps it in at least 99%", lambda share: share >= STRICT),
        (moved, "the same in plain PEFT, where only its own end token stops it", lambda share: share >= STRICT),
        (peft, "plain PEFT's adapter keeps it in at least 99%", lambda share: share >= STRICT),
    ):
        found.append(Check(claim, holds(arm["strict"]["share"]) if arm else None, _shown(arm and arm["strict"])))
    for arm, name in ((lema, "the adapter"), (peft, "plain PEFT's adapter")):
        claim = f"{name}: right answers of every category no fewer than the base model's, asked plainly (95% interval)"
        if arm is None or plain is None:
            found.append(Check(claim, None))
            continue
        fewer = [
            f"{category} {arm['categories'][category]['share']:.1%} of {share['low']:.1%} to {share['high']:.1%}"
            for category, share in plain["categories"].items()
            if arm["categories"][category]["share"] < share["low"]
        ]
        found.append(Check(claim, not fewer, ", ".join(fewer) or "none is below"))
    return found


def _checks_of_curves(curves: Mapping[str, Sequence[float]]) -> list[Check]:
    ours, theirs = curves["LEMA"], curves["PEFT"]
    claim = f"the last tenth of the loss curve is plain PEFT's within {SAME_CURVE:.0%}"
    if not ours or len(ours) != len(theirs):
        return [Check(claim, None, f"{len(ours)} and {len(theirs)} steps")]
    tail = max(len(ours) // 10, 1)
    ends = [statistics.fmean(curve[-tail:]) for curve in (ours, theirs)]
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    detail = f"{ends[0]:.5f} and {ends[1]:.5f}; largest difference of a step {max(apart):.2e}, in the first 50 "
    return [Check(claim, abs(ends[0] / ends[1] - 1) <= SAME_CURVE, f"{detail}{max(apart[:50]):.2e}")]


def _checks_of_merge(numbers: Mapping[str, dict[str, Any]]) -> list[Check]:
    found = numbers.get("merge")
    same = "merged, in plain transformers: every greedy answer as that of base and adapter (fp32)"
    close = "merged logits within 1e-3 of those of base and adapter"
    if not found:
        return [Check(same, None), Check(close, None)]
    difference = found["largest_logit_difference"]
    return [
        Check(same, found["same_answers"] == found["questions"], f"{found['same_answers']} of {found['questions']}"),
        Check(close, difference <= 1e-3, f"{difference:.2e}, the largest logit is {found['largest_logit']:.1f}"),
    ]


def _of(numbers: Mapping[str, dict[str, Any]], part: str, key: str) -> Any:
    return numbers.get(part, {}).get(key) or {}


def _shown(share: Mapping[str, Any] | None) -> str:
    return "-" if not share or share["share"] is None else f"{share['share']:.1%} ({share['hits']} of {share['of']})"


def _part(kind: str, options: argparse.Namespace, folder: Path, work: Path) -> Run:
    """Run a part, or take what an earlier call in the same folder found."""
    kept = work / f"{kind}.json"
    if kept.is_file():
        return Run(PARTS[kind], 0, 0, numbers=json.loads(kept.read_text(encoding="utf-8")))
    arm = Arm(
        PARTS[kind], kind, folder,
        {"work": str(work), "recipe": str(options.recipe), "steps": options.steps, "questions": options.questions},
        module="benchmarks.proof_arms",
    )  # fmt: skip
    run = run_arm(arm, 0, options.timeout)
    run.options = {key: value for key, value in run.options.items() if key not in ("work", "recipe")}
    describe(run)
    if run.numbers is not None:
        kept.write_text(json.dumps(run.numbers), encoding="utf-8")
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data, train twice, ask, merge, and write the report."""
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    made.add_argument("--count", type=int, default=5000, help="rows to train on (default: %(default)s)")
    made.add_argument("--steps", type=int, default=0, help="steps; 0: the recipe's (default: %(default)s)")
    made.add_argument("--questions", type=int, default=400, help="held-out questions (default: %(default)s)")
    made.add_argument("--timeout", type=int, default=7200, help="seconds a part may take (default: %(default)s)")
    made.add_argument("--parts", default=",".join(PARTS), help="which to do (default: all)")
    made.add_argument("--folder", type=Path, help="another model (default: SmolLM2-135M-Instruct)")
    made.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "lema_reply_smollm2_135m.yaml")
    made.add_argument("--work", type=Path, help="everything made; parts found there are not done again")
    made.add_argument("--out", type=Path, default=OUT, help="where the report goes (default: docs/benchmarks)")
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        folder = options.folder or Path(run_module("benchmarks.demo_folder"))
        if not (work / TRAIN).is_file():
            run_module(
                "lema", "data", "build", "-o", str(work / TRAIN), "--held-out", str(work / HELD_OUT),
                "--count", str(options.count), "--any-size",
            )  # fmt: skip
        report = Report(
            "proof", "The [LEMA_REPLY] proof: SmolLM2-135M-Instruct, two cores, CPU", command_line(MODULE, options)
        )
        report.runs = [_part(kind, options, folder, work) for kind in PARTS if kind in options.parts.split(",")]
        kinds = {label: kind for kind, label in PARTS.items()}
        judge(report, {kinds[run.label]: run.numbers for run in report.runs if run.numbers is not None})
    report.notes = list(NOTES)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
