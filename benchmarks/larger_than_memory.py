"""Larger than memory: a 1.7B model in bf16 trained inside a memory group smaller than its weights.

It knows the arms, the limit and what to clear before each arm; it does not know how an arm measures itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .memory_group import MemoryGroup
from .processes import Arm, Run, alternate, describe, run_arm, run_module
from .report import Report, check_common, command_line, common_options, loss_note, median_of, ratio, write

MIB = 1 << 20
MODULE = "benchmarks.larger_than_memory"
STREAMING, RESIDENT, PEFT = "LEMA streaming, limited", "LEMA resident, no limit", "PEFT+checkpointing, limited"
NOTES = (
    "The group's peak holds anonymous memory, page cache and kernel memory first touched inside it. Pages of libraries "
    "that were in memory before are counted to whoever brought them in, so part of the imports may be outside of it.",
    "Before each arm the weights are dropped from this machine's page cache. Below a virtual machine the host may "
    "still hold them, so the disk can look faster than it is.",
    "Bytes from the disk are the kernel's count for the process over the timed steps, whatever the file; the engine's "
    "own count is of weights it asked for in the same steps.",
    "transformers may leave bf16 weights mapped from their file. The kernel can drop such pages, so a killed PEFT arm "
    "says that its other memory (activations, logits, adapters, optimizer) did not fit, not that its weights did not.",
    "Only LEMA cuts its loss into chunks, a setting the PEFT arm does not have.",
    "The first step of an arm is not timed. Random weights: only the shape matters for these figures.",
)


def evict(folder: Path) -> None:
    """Ask the kernel to drop the folder's files from the page cache."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only clean pages can be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def why_no_group(limit_bytes: int) -> str | None:
    """None if a memory group can be made here, else the reason."""
    try:
        with MemoryGroup(limit_bytes):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def model_folder(given: Path | None, keep: bool) -> Iterator[Path]:
    """The model's folder, made where it is missing; one made here is removed afterwards unless it is kept."""
    folder = given.resolve() if given else Path(tempfile.mkdtemp(prefix="lema-benchmark-"))
    ours = not (folder / "config.json").is_file()
    if ours and folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} has files but no config.json: name a model's folder or an empty one")
    try:
        if ours:
            print("making the 1.7B model ...", file=sys.stderr, flush=True)
            run_module("benchmarks.make_model", "1.7b", str(folder))
        yield folder
    finally:
        if ours and not keep:
            for name in ("model.safetensors", "config.json", "generation_config.json"):
                (folder / name).unlink(missing_ok=True)
            if given is None:
                shutil.rmtree(folder, ignore_errors=True)


def streaming_facts(runs: Sequence[Run]) -> dict[str, str]:
    """What the limited arm read, waited and held, in words."""
    done = [run for run in runs if run.label == STREAMING and run.numbers is not None]
    facts: dict[str, str] = {}
    for run in done:
        numbers = run.numbers or {}
        steps = len(numbers["timed_seconds"])
        disk, engine = numbers["disk_read_bytes"], numbers["engine_read_bytes"]
        said = "unknown" if disk is None else f"{disk / steps / 1e9:.2f} GB a step from the disk"
        facts[f"reads, pair {run.pair + 1}"] = f"{said}; by the engine's own count {engine / steps / 1e9:.2f} GB a step"
        if run.group is not None and run.group["peak_bytes"] is not None:
            facts[f"peak of the group, pair {run.pair + 1}"] = (
                f"{run.group['peak_bytes'] / MIB:.0f} of {(run.group['limit_bytes'] or 0) / MIB:.0f} MiB"
            )
    share, seconds = median_of(runs, STREAMING, "waiting_share"), median_of(runs, STREAMING, "median_step_seconds")
    if share is not None and seconds is not None:
        facts["LEMA streaming"] = f"{seconds:.2f} s/step, of which {share:.1%} is waiting for weights"
    return facts


def peft_fact(run: Run) -> str:
    """How PEFT fared in the same group."""
    if run.numbers is not None:
        return f"finished, {run.numbers['median_step_seconds']:.2f} s/step"
    return run.failure or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "1.7B bf16 model in a memory group smaller than its weights", pairs=2, steps=4)
    made.add_argument(
        "--limit-mb", type=int, default=1300, help="size of the memory group in MiB (default: %(default)s)"
    )
    made.add_argument("--chunk", type=int, default=256, help="LEMA: target positions a piece of the loss")
    made.add_argument("--slots", type=int, default=2, help="LEMA: units of weights in memory at once")
    made.add_argument(
        "--folder",
        type=Path,
        help="the model's folder, filled if empty; on a real disk, not tmpfs (default: temporary)",
    )
    made.add_argument("--keep", action="store_true", help="do not delete a model made by this run")
    options = made.parse_args(arguments)
    check_common(made, options)
    reason = why_no_group(options.limit_mb * MIB)
    limit = None if reason else options.limit_mb * MIB
    settings = {"dtype": "bfloat16", "tokens": options.tokens, "rank": options.rank, "steps": options.steps}
    lema = {**settings, "chunk": options.chunk, "slots": options.slots}
    report = Report("larger_than_memory", "Larger than memory: 1.7B, bf16, CPU", command_line(MODULE, options))
    with model_folder(options.folder, options.keep) as folder:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        clear = functools.partial(evict, folder)
        arms = [
            Arm(STREAMING, "lema", folder, lema, limit),
            Arm(RESIDENT, "lema", folder, {**lema, "strategy": "resident"}),
        ]
        report.runs = list(alternate(arms, options.pairs, options.timeout, clear))
        clear()
        peft = run_arm(Arm(PEFT, "peft_checkpointing", folder, settings, limit), 0, options.timeout)
        describe(peft)
    report.runs.append(peft)
    report.ratios = [
        ratio(report.runs, "step time, streaming limited / resident", "median_step_seconds", STREAMING, RESIDENT)
    ]
    report.facts = {
        "weights": f"{weights / MIB:.0f} MiB",
        "limit": f"{limit / MIB:.0f} MiB" if limit else f"NONE, no memory group can be made here: {reason}",
        **streaming_facts(report.runs),
        "PEFT+checkpointing in the same group" if limit else "PEFT+checkpointing without a limit": peft_fact(peft),
    }
    report.notes = [*NOTES, loss_note(report.runs)]
    if reason:
        report.notes.insert(0, "No arm had a memory limit here, whatever its label says.")
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
