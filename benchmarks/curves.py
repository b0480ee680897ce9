"""Three short loss curves, to the last bit: the proof that a change of the code changed no number.

    python -m benchmarks.curves --out before.json       # with the code of before
    python -m benchmarks.curves --against before.json   # with that of now; exit status 1 where a bit differs

Bits hold for one processor, torch and number of threads, which the file names. Only public names are used, so that
code of another time can run this as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lema

from .folders import SMOLLM2, shape_folder

STEPS = 6
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M, float32, defaults": (SMOLLM2, {"dtype": "float32", "max_seq_length": 96}),
    "small, float32, dropout, two rows in micro-batches, accumulation of two": (
        "small",
        {
            "dtype": "float32", "lora_dropout": 0.1, "batch_size": 2, "micro_batch_size": 1,
            "gradient_accumulation_steps": 2, "max_seq_length": 64,
        },
    ),
    "small, float16, a budget, activations kept, the head in pieces": (
        "small",
        {
            "dtype": "float16", "ram_budget": "2GB", "keep_activations": 3, "head": "chunked", "loss_chunk_size": 24,
            "max_seq_length": 64,
        },
    ),
}  # fmt: skip
"""By name: the shape, and the settings beside the model."""


def curve(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Losses of a few calls and the gradient norms of their steps, then a checksum of the adapter, as exact hex."""
    config = lema.LemaConfig(str(folder), device="cpu", seed=3, learning_rate=1e-3, save_steps=0, **settings)
    found: list[str] = []
    torch.manual_seed(7)
    with lema.LemaModel(config) as model:
        trainer = model.get_trainer()
        for ids in _batches(config):
            _, loss = trainer.train_step(ids, ids)
            assert loss is not None
            found.append(float(loss).hex())
            norm = trainer.last_step.grad_norm if trainer.last_step is not None else None
            found.append("no step" if norm is None else float(norm).hex())
        total = sum(float(p.detach().double().abs().sum()) for p in model.get_trainable_parameters())
    return [*found, total.hex()]


def _batches(config: Any) -> Iterator[torch.Tensor]:
    drawn = torch.Generator().manual_seed(11)
    for _ in range(STEPS * config.gradient_accumulation_steps):
        yield torch.randint(5, 4000, (config.batch_size, config.max_seq_length), generator=drawn)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the curves; write them, or compare them with those of a file."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    made.add_argument("--out", type=Path, help="file to write")
    made.add_argument("--against", type=Path, help="file to compare with")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "lema": lema.__version__, "torch": torch.__version__, "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": 1, "curves": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for name, (shape, settings) in CURVES.items():
            given = None if shape == SMOLLM2 else Path(place) / settings["dtype"]
            with shape_folder(shape, given, True, settings["dtype"]) as folder:
                found["curves"][name] = curve(folder, settings)
                print(name, *(float.fromhex(x) for x in found["curves"][name][0::2]))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text(encoding="utf-8"))
    differing = [name for name in CURVES if before["curves"].get(name) != found["curves"][name]]
    if elsewhere := [key for key in ("torch", "kernels") if before[key] != found[key]]:
        print(f"made elsewhere, so bits may differ: {', '.join(elsewhere)}")
    print(f"differ: {'; '.join(differing)}" if differing else "every bit is as before")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
