"""Larger than memory: a model in bf16 trained inside a memory group smaller than its weights.

It knows the arms, the limit and what to clear before each arm; it does not know how an arm measures itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import machine
from .counters import MIB
from .folders import evict, model_folder, weights_bytes
from .make_model import PRESETS
from .memory_group import MemoryGroup
from .options import (
    command_line,
    common_options,
    model_options,
    name_of,
    parse,
    size,
    title_of,
    written_budget,
    written_size,
)
from .plots import Panel
from .processes import Arm, Option, Run, alternate, describe, run_arm
from .report import Check, Report, Table, loss_check, median_of, number, ratio, write
from .tables import EVICTED, PLAN_SEES, RANDOM_WEIGHTS, SECONDS, bars, predictions, within_budget

MODULE = "benchmarks.larger_than_memory"
STREAMING, RESIDENT, PEFT = "LEMA streaming, limited", "LEMA, all in RAM, no limit", "PEFT+checkpointing, limited"
BYTES, LOADS, WAITING = "engine_bytes_per_step", "loads_per_step", "waiting_share"
RESIDENT_SHARE = 0.8
"""Of the RAM that is free: weights above it are not read into RAM for the arm without a limit."""
NOTES = (
    "The group's peak holds anonymous memory, page cache and kernel memory first touched inside it. Pages of libraries "
    "that were in memory before are counted to whoever brought them in, so part of the imports may be outside of it.",
    EVICTED,
    "Bytes from the disk are the kernel's count for the process over the timed steps, whatever the file; the engine's "
    "own count is of weights it asked for in the same steps.",
    "All in RAM: the weights of every layer and of the head are read into RAM of the process once, in the step that is "
    "not timed, and used from there; nothing is mapped.",
    "transformers may leave bf16 weights mapped from their file. The kernel can drop such pages, so a killed PEFT arm "
    "says that its other memory (activations, logits, adapters, optimizer) did not fit, not that its weights did not.",
    "Only LEMA cuts its loss into chunks, a setting the PEFT arm does not have.",
    "The first step of an arm is not timed. " + RANDOM_WEIGHTS,
)


def why_no_group(limit_bytes: int) -> str | None:
    """None if a memory group can be made here, else the reason."""
    try:
        with MemoryGroup(limit_bytes):
            return None
    except OSError as error:
        return error.strerror or str(error)


def free_ram_bytes() -> int | None:
    """What the kernel calls available; None on systems that do not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def memory_table(runs: Sequence[Run]) -> Table:
    """What the limited arms read, waited and held."""
    head = ["arm", "pair", "loads a step", "engine GB a step", "disk GB a step", "waiting share", "group peak MiB",
            "limit MiB", "peak MiB above imports"]  # fmt: skip
    rows = []
    for run in runs:
        disk = number(run, "disk_read_bytes")
        steps = len((run.numbers or {}).get("timed_seconds", ())) or 1
        engine, group = number(run, BYTES), run.group or {}
        sizes = [group.get(key) for key in ("peak_bytes", "limit_bytes")]
        rows.append(
            [run.label, run.pair + 1, number(run, LOADS), None if engine is None else engine / 1e9,
             None if disk is None else disk / steps / 1e9, number(run, WAITING),
             *(None if value is None else value / MIB for value in sizes), number(run, "above_floor_mib")]
        )  # fmt: skip
    return Table("Reads, waits and memory", head, rows)


def outcome(run: Run) -> str:
    """How PEFT fared in the same group."""
    if run.numbers is not None:
        return f"finished, {run.numbers[SECONDS]:.2f} s/step"
    return run.failure or "unknown"


def judge(report: Report, limit: int | None, with_resident: bool, budget: str | None) -> None:
    """Ratios, claims, tables and plot."""
    runs = report.runs
    report.tables = [memory_table(runs), predictions(runs, "Predictions")]
    report.checks = [loss_check(runs)]
    if budget is not None:
        report.checks.append(within_budget(runs, STREAMING, f"{STREAMING}, {budget}"))
    if with_resident:
        name = "step time, streaming limited / all in RAM"
        report.ratios = [ratio(runs, name, SECONDS, STREAMING, RESIDENT)]
        read = median_of(runs, RESIDENT, BYTES)
        report.checks.append(
            Check(f"`{RESIDENT}` reads nothing in its timed steps", None if read is None else read == 0)
        )
    seconds, share = median_of(runs, STREAMING, SECONDS), median_of(runs, STREAMING, WAITING)
    if seconds is not None and share is not None:
        report.facts[STREAMING] = f"{seconds:.2f} s/step, of which {share:.1%} is waiting for weights"
    peaks = [run.group["peak_bytes"] for run in runs if run.label == STREAMING and run.group]
    panel = Panel(
        "Peak of the group", "", "MiB",
        {"peak": {f"pair {n + 1}": peak / MIB for n, peak in enumerate(peaks) if peak}},
        {} if limit is None else {"limit": limit / MIB},
    )  # fmt: skip
    report.panels = [bars(runs, "Step time", "s/step", SECONDS), *([panel] if any(peaks) else [])]


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = common_options(MODULE, "bf16 model in a memory group smaller than its weights", pairs=2, steps=4)
    model_options(made, "1.7b")
    made.add_argument(
        "--limit",
        type=written_size,
        default="1300MB",
        help="of the memory group: 1300MB, 1240MiB (default: %(default)s)",
    )
    made.add_argument("--limit-mb", type=int, help="the same in MiB, as earlier versions had it")
    made.add_argument("--ram-budget", type=written_budget, help="LEMA streaming: plan for this much above the imports")
    made.add_argument("--chunk", type=int, default=0, help="LEMA: target positions a piece of the loss; 0: its own")
    made.add_argument("--slots", type=int, default=2, help="LEMA: units of weights in memory at once")
    made.add_argument("--no-resident", action="store_true", help="leave the arm without a limit out")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    options = parse(parser(), arguments)
    if options.limit_mb is not None:
        options.limit, options.limit_mb = f"{options.limit_mb}MiB", None
    reason = why_no_group(size(options.limit))
    limit = None if reason else size(options.limit)
    settings: dict[str, Option] = {
        "dtype": "bfloat16", "tokens": options.tokens, "rank": options.rank, "steps": options.steps
    }  # fmt: skip
    lema = {**settings, "chunk": options.chunk, "slots": options.slots}
    layers = PRESETS[options.shape]["num_hidden_layers"]
    budget = [] if options.ram_budget is None else [f"ram_budget={options.ram_budget}"]
    name = name_of("larger_than_memory", options.shape, "1.7b")
    title = f"Larger than memory: {title_of(options.shape)}, bf16, CPU"
    report = Report(name, title, command_line(MODULE, options))
    with model_folder(options.shape, options.folder, options.keep) as folder:
        weights, free = weights_bytes(folder), free_ram_bytes()
        fits = free is None or weights < RESIDENT_SHARE * free
        report.facts = {
            "weights": f"{weights / MIB:.0f} MiB",
            "limit": f"{limit / MIB:.0f} MiB" if limit else f"NONE, no memory group can be made here: {reason}",
            PLAN_SEES: machine.ask(folder)["words"],
        }
        if not fits and not options.no_resident:
            report.notes.append(f"`{RESIDENT}` was left out: the weights do not fit into {RESIDENT_SHARE:.0%} of RAM.")
        arms = [Arm(STREAMING, "lema", folder, {**lema, "set": budget, "predict": 1}, limit)]
        with_resident = fits and not options.no_resident
        if with_resident:
            everything = [f"ram_layers={layers}", "keep_activations=0", "head=resident"]
            arms.append(Arm(RESIDENT, "lema", folder, {**lema, "set": everything}))
        report.runs = list(alternate(arms, options.pairs, options.timeout, lambda arm: evict(arm.folder)))
        evict(folder)
        peft = run_arm(Arm(PEFT, "peft_checkpointing", folder, settings, limit), 0, options.timeout)
        describe(peft)
    report.runs.append(peft)
    report.facts["PEFT+checkpointing in the same group" if limit else PEFT] = outcome(peft)
    judge(report, limit, with_resident, options.ram_budget)
    report.notes += NOTES
    if reason:
        report.notes.insert(0, "No arm had a memory limit here, whatever its label says.")
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
