"""One arm of a comparison in its own process: builds a model, trains some steps, prints one JSON line.

It knows how LEMA and PEFT are driven and how a process measures itself. It does not know of other arms, of
ratios, or of limits put on it from outside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("lema", "peft", "peft_checkpointing")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_ALPHA = 32
LEARNING_RATE = 1e-4
SEED = 0

Step = Callable[[], tuple[float, dict[str, Any]]]
"""One training step: its loss, and what else it counted."""


def proc_value(name: str, key: str) -> int | None:
    """A number out of `/proc/self/<name>`; None on systems without it."""
    try:
        lines = Path("/proc/self", name).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def peak_mib() -> float:
    """Highest resident set of this program so far, mapped file pages included.

    VmHWM, which is `ru_maxrss` without what the parent process held before exec; `ru_maxrss` elsewhere.
    """
    kib = proc_value("status", "VmHWM")
    if kib is None:
        import resource

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return kib / 1024


def settings(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs as settings; values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def lema_step(options: argparse.Namespace, ids: Any) -> Step:
    """LEMA's `train_step`."""
    import torch

    import lema

    config = lema.LemaConfig(
        str(options.folder),
        device="cpu",
        dtype=options.dtype,
        strategy=options.strategy,
        lora_rank=options.rank,
        lora_alpha=LORA_ALPHA,
        lora_target_modules=list(TARGETS),
        loss_chunk_size=options.chunk or None,
        num_slots=options.slots,
        save_steps=0,
        batch_size=options.batch,
        max_seq_length=options.tokens,
        **settings(options.set),
    )
    model = lema.LemaModel(config)
    trainer = model.get_trainer(torch.optim.AdamW(model.get_trainable_parameters(), lr=LEARNING_RATE))

    def step() -> tuple[float, dict[str, Any]]:
        _, loss = trainer.train_step(ids, ids)
        last = trainer.last_step
        assert loss is not None and last is not None
        counted = {name: getattr(last, name) for name in ("wait_seconds", "step_seconds", "loads", "bytes_read")}
        return loss, counted

    step.plan = model.memory.plan  # type: ignore[attr-defined]

    return step


def peft_step(options: argparse.Namespace, ids: Any) -> Step:
    """The plain loop around transformers' model with PEFT's LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype))
    lora = LoraConfig(r=options.rank, lora_alpha=LORA_ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.train()
    if options.arm == "peft_checkpointing":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> tuple[float, dict[str, Any]]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), {}

    return step


def plan_summary(plan: Any) -> dict[str, Any] | None:
    """What a plan decided and predicted, in a line's worth of numbers; None without a plan."""
    if plan is None:
        return None
    return {
        "on_device": len(plan.on_device),
        "in_ram": len(plan.in_ram),
        "from_disk": len(plan.from_disk),
        "keep_activations": len(plan.keep_activations),
        "head": plan.head,
        "loss_chunk_size": plan.loss_chunk_size,
        "micro_batch_size": plan.micro_batch_size,
        "predicted_mib": round(plan.host_peak / 2**20, 1),
        "predicted_parts_mib": {name: round(size / 2**20, 1) for name, size in plan.host_bytes.items()},
        "estimated_seconds": round(plan.estimate.step_seconds, 3),
        "bound_by": plan.estimate.bound_by,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Import, note the floor, build, train; every number of this arm."""
    import peft  # noqa: F401
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))
    getattr(transformers, shape["architectures"][0])
    transformers.AutoModelForCausalLM  # noqa: B018  (imported when named)
    floor = peak_mib()

    torch.manual_seed(SEED)
    ids = torch.randint(0, shape["vocab_size"], (options.batch, options.tokens))
    built = time.perf_counter()
    step = lema_step(options, ids) if options.arm == "lema" else peft_step(options, ids)
    built = time.perf_counter() - built
    seconds, losses, counts = [], [], []
    disk_before: int | None = None
    for number in range(options.steps):
        if number == 1:
            disk_before = proc_value("io", "read_bytes")
        start = time.perf_counter()
        loss, counted = step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        print(f"step {number + 1} done", file=sys.stderr, flush=True)  # tells how far a killed arm came
        counts.append(counted)
    disk_after = proc_value("io", "read_bytes")
    kib = {name: proc_value("status", name) for name in ("RssAnon", "RssFile")}
    timed = counts[1:]
    result: dict[str, Any] = {
        "arm": options.arm,
        "floor_mib": round(floor, 1),
        "peak_mib": round(peak_mib(), 1),
        "above_floor_mib": round(peak_mib() - floor, 1),
        "end_anonymous_mib": None if kib["RssAnon"] is None else round(kib["RssAnon"] / 1024, 1),
        "end_file_mib": None if kib["RssFile"] is None else round(kib["RssFile"] / 1024, 1),
        "build_seconds": round(built, 3),
        "warm_up_seconds": round(seconds[0], 4),
        "timed_seconds": [round(value, 4) for value in seconds[1:]],
        "median_step_seconds": round(statistics.median(seconds[1:]), 4),
        "losses": losses,
        "disk_read_bytes": None if disk_before is None or disk_after is None else disk_after - disk_before,
        "threads": torch.get_num_threads(),
    }
    if options.arm == "lema":
        result["strategy"] = options.strategy
        result["plan"] = plan_summary(getattr(step, "plan", None))
        result["last_step"] = timed[-1]
        result["engine_read_bytes"] = sum(counted["bytes_read"] for counted in timed)
        waited = sum(counted["wait_seconds"] for counted in timed)
        result["waiting_share"] = round(waited / sum(counted["step_seconds"] for counted in timed), 4)
    return result


def parser() -> argparse.ArgumentParser:
    """The arm's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.arms", description=__doc__.splitlines()[0])
    made.add_argument("arm", choices=KINDS)
    made.add_argument("--folder", type=Path, required=True, help="transformers folder of the model")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--tokens", type=int, default=512)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--steps", type=int, default=6, help="steps in all; the first one only warms up")
    made.add_argument("--chunk", type=int, default=0, help="LEMA: target positions a piece of the loss; 0: all at once")
    made.add_argument("--slots", type=int, default=2, help="LEMA: units of weights in memory at once")
    made.add_argument("--set", action="append", default=[], help="LEMA: another setting, as ram_budget=2GB")
    made.add_argument("--strategy", default="streaming", choices=("streaming", "resident"), help="LEMA")
    return made


def main() -> None:
    """Measure one arm and print it."""
    made = parser()
    options = made.parse_args()
    if options.steps < 2:
        made.error("--steps must be 2 or more: the first one only warms up")
    print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    main()
