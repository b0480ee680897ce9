"""Step time of LEMA beside PEFT and beside its own limits: the computation alone, the reads alone, and dd.

It knows the arms and which two bound a third; it does not know how an arm measures itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .folders import evict, model_folder
from .make_model import PRESETS
from .options import command_line, common_options, model_options, name_of, parse, title_of
from .plots import Panel
from .processes import Arm, Option, Run, alternate
from .report import Check, Report, loss_check, median_of, ratio, write
from .tables import ABOVE_IMPORTS, ARMS_ALIKE, EVICTED, MAPPED, RANDOM_WEIGHTS, SECONDS, arm_bars, bars

MODULE = "benchmarks.speed"
LEMA, CHECKPOINTING, PLAIN = "LEMA", "PEFT+checkpointing", "PEFT"
COMPUTE, IO, HALF, HALF_IO = "LEMA, all in RAM", "reads only", "LEMA, half on disk", "reads only, half"
READER, DD = "reader", "dd"
READER_TARGET = 0.85
BYTES = "engine_bytes_per_step"
NOTES = (
    ARMS_ALIKE,
    "All in RAM: every layer kept in RAM and recomputed, so a step is the same arithmetic without reads. Reads only: "
    "the same visits through the same slots and readers with nothing computed. A step cannot take less than either; "
    "the ratio to the larger of the two says how much of the reading is hidden.",
    "The reader and dd read the whole weights file past the page cache, 8 MiB a request; dd has one request under way, "
    "the reader one a thread. Where a file system grants no direct reads dd fails and the ratio is not measured.",
    "Beside arms that compute, the reader shares the cores with them; beside dd it does not.",
    EVICTED,
    ABOVE_IMPORTS,
    MAPPED,
    RANDOM_WEIGHTS,
)


def arms_of(folder: Path, options: argparse.Namespace) -> list[Arm]:
    """Every arm of a round."""
    layers = PRESETS[options.shape]["num_hidden_layers"]
    settings: dict[str, Option] = {
        "dtype": "bfloat16", "tokens": options.tokens, "rank": options.rank, "steps": options.steps
    }  # fmt: skip
    lema = {**settings, "chunk": options.chunk, "slots": options.slots}
    everything = {**lema, "set": [f"ram_layers={layers}", "keep_activations=0", "head=resident"]}
    half = {**lema, "set": [f"ram_layers={layers // 2}", "keep_activations=0", "head=streamed"]}
    files = {"repeats": options.repeats}
    reader = {**files, "slots": options.slots}
    return [
        Arm(LEMA, "lema", folder, lema),
        Arm(IO, "lema_io", folder, lema),
        Arm(COMPUTE, "lema", folder, everything),
        Arm(HALF, "lema", folder, half),
        Arm(HALF_IO, "lema_io", folder, half),
        Arm(CHECKPOINTING, "peft_checkpointing", folder, settings),
        Arm(PLAIN, "peft", folder, settings),
        Arm(READER, "reader", folder, reader, module="benchmarks.reading"),
        Arm(DD, "dd", folder, files, module="benchmarks.reading"),
    ]


def same_bytes(runs: Sequence[Run], computing: str, reading: str) -> Check:
    """Whether the arm without computation really read what the other one did."""
    own, other = median_of(runs, computing, BYTES), median_of(runs, reading, BYTES)
    claim = f"`{reading}` reads as many bytes a step as `{computing}`"
    if own is None or other is None:
        return Check(claim, None)
    return Check(claim, own == other, f"{own / 1e9:.3f} and {other / 1e9:.3f} GB")


def judge(report: Report) -> None:
    """Ratios, claims, facts and plot of the runs there are."""
    runs = report.runs
    report.ratios = [
        ratio(runs, "step time, LEMA / PEFT+checkpointing", SECONDS, LEMA, CHECKPOINTING),
        ratio(runs, "step time, LEMA / PEFT", SECONDS, LEMA, PLAIN),
        ratio(runs, "step time, LEMA / max(computation, reads)", SECONDS, LEMA, (COMPUTE, IO)),
        ratio(runs, "step time, half on disk / max(computation, reads)", SECONDS, HALF, (COMPUTE, HALF_IO)),
        ratio(runs, "step time, all in RAM / PEFT+checkpointing", SECONDS, COMPUTE, CHECKPOINTING),
        ratio(runs, "bytes a second, reader / dd", "bytes_per_second", READER, DD, READER_TARGET, at_least=True),
    ]
    nothing = median_of(runs, COMPUTE, BYTES)
    report.checks = [
        same_bytes(runs, LEMA, IO),
        same_bytes(runs, HALF, HALF_IO),
        Check(f"`{COMPUTE}` reads nothing in its timed steps", None if nothing is None else nothing == 0),
        loss_check(runs),
    ]
    for label in (READER, DD, IO):
        rate = median_of(runs, label, "bytes_per_second")
        if label == IO:
            size, seconds = median_of(runs, IO, BYTES), median_of(runs, IO, SECONDS)
            rate = size / seconds if size and seconds else None
        report.facts[f"rate of {label}"] = "not measured" if rate is None else f"{rate / 1e9:.2f} GB/s"
    aligned = median_of(runs, READER, "direct_alignment")
    report.facts["direct reads"] = f"alignment {aligned:.0f} bytes" if aligned else "not granted here"
    computing = [LEMA, HALF, COMPUTE, CHECKPOINTING, PLAIN]
    limits = {label: median_of(runs, label, SECONDS) for label in (COMPUTE, IO)}
    levels = {label: value for label, value in limits.items() if value is not None}
    times = Panel("Step time and its limits", "", "s/step", bars(runs, "", "", SECONDS, computing).series, levels)
    rates = {label: (median_of(runs, label, "bytes_per_second") or 0.0) / 1e9 for label in (READER, DD)}
    report.panels = [times, arm_bars(runs, computing)[1], Panel("Direct reads", "", "GB/s", {"median": rates})]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "step time beside PEFT and beside the limits", pairs=3, steps=4)
    model_options(made, "1.7b")
    made.add_argument("--chunk", type=int, default=0, help="LEMA: target positions a piece of the loss; 0: its own")
    made.add_argument("--slots", type=int, default=2, help="LEMA: units of weights in memory at once")
    made.add_argument("--repeats", type=int, default=3, help="how often the reader and dd read the file in an arm")
    options = parse(made, arguments)
    name = name_of("speed", options.shape, "1.7b")
    report = Report(name, f"Step time and its limits: {title_of(options.shape)}, CPU", command_line(MODULE, options))
    with model_folder(options.shape, options.folder, options.keep) as folder:
        arms = arms_of(folder, options)
        report.runs = list(alternate(arms, options.pairs, options.timeout, lambda arm: evict(arm.folder)))
    judge(report)
    report.notes = list(NOTES)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
