"""One arm of a comparison in its own process: builds a model, takes some steps, prints one JSON line.

It knows how a process measures itself. It does not know of other arms, of ratios, or of limits put on it from
outside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .counters import Device, peak_mib, proc_value, status_mib
from .steps import KINDS, Driver, driver

SEED = 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Import, note the floor, build, take the steps; every number of this arm."""
    shape = import_all(options.folder)
    import torch

    device = Device(options.device)
    floor = peak_mib()
    torch.manual_seed(SEED)
    ids = torch.randint(0, shape["vocab_size"], (options.batch, options.tokens))
    started = time.perf_counter()
    made = driver(options, ids)
    built = time.perf_counter() - started
    result = {
        "arm": options.kind,
        "floor_mib": round(floor, 1),
        "build_seconds": round(built, 3),
        "threads": torch.get_num_threads(),
        **take_steps(made, device, options.steps),
        "peak_mib": round(peak_mib(), 1),
        "above_floor_mib": round(peak_mib() - floor, 1),
        "end_anonymous_mib": status_mib("RssAnon"),
        "end_file_mib": status_mib("RssFile"),
        **device.numbers(),
    }
    if options.trace is not None and made.memory is not None:  # after every number was taken
        from .trace import record

        result["trace"] = record(made.step, made.memory, device, options.trace)
    return {**result, **made.summary()}


def import_all(folder: Path) -> dict[str, Any]:
    """Import what every arm needs, before the floor is noted; returns the model's config.json."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    getattr(transformers, shape["architectures"][0])
    transformers.AutoModelForCausalLM  # noqa: B018  (imported when named)
    return shape


def take_steps(made: Driver, device: Device, steps: int) -> dict[str, Any]:
    """Steps with their seconds, losses and counts; the first one only warms up."""
    seconds, losses = [], []
    before: dict[str, float] = {}
    disk_before: int | None = None
    for number in range(steps):
        if number == 1:
            before, disk_before = made.counted(), proc_value("io", "read_bytes")
        start = time.perf_counter()
        losses.append(made.step())
        device.synchronize()
        seconds.append(time.perf_counter() - start)
        print(f"step {number + 1} done", file=sys.stderr, flush=True)  # tells how far a killed arm came
    disk_after, after = proc_value("io", "read_bytes"), made.counted()
    timed = seconds[1:]
    result: dict[str, Any] = {
        "warm_up_seconds": round(seconds[0], 6),
        "timed_seconds": [round(value, 6) for value in timed],
        "median_step_seconds": round(statistics.median(timed), 6),
        "losses": losses,
        "disk_read_bytes": None if disk_before is None or disk_after is None else disk_after - disk_before,
    }
    if after:
        each = {name: (value - before[name]) / len(timed) for name, value in after.items()}
        result |= {
            "loads_per_step": each["loads"],
            "engine_bytes_per_step": each["bytes_read"],
            "copied_bytes_per_step": each["bytes_copied"],
            "waiting_seconds": round(each["wait_seconds"], 6),
            "waiting_share": round(each["wait_seconds"] * len(timed) / sum(timed), 4),
        }
    return result


def parser() -> argparse.ArgumentParser:
    """The arm's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.arms", description=__doc__.splitlines()[0])
    made.add_argument("kind", choices=KINDS)
    made.add_argument("--folder", type=Path, required=True, help="transformers folder of the model")
    made.add_argument("--device", default="cpu", help="where layers are computed")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--tokens", type=int, default=512)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--steps", type=int, default=6, help="steps in all; the first one only warms up")
    made.add_argument("--chunk", type=int, default=0, help="LEMA: target positions a piece of the loss; 0: its own")
    made.add_argument("--slots", type=int, default=2, help="LEMA: units of weights in memory at once")
    made.add_argument("--set", action="append", default=[], help="LEMA: another setting, as ram_budget=2GB")
    made.add_argument("--strategy", default="streaming", choices=("streaming", "resident"), help="LEMA")
    made.add_argument("--predict", type=int, default=0, help="LEMA: 1: ask a plan even where none was in force")
    made.add_argument("--trace", type=Path, help="LEMA: write a timeline of one more step to this file (.json.gz)")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one arm and print it."""
    made = parser()
    options = made.parse_args(arguments)
    if options.steps < 2:
        made.error("--steps must be 2 or more: the first one only warms up")
    print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    main()
