"""Peak memory of one training step: plain PEFT (baseline) or LEMA, each in a process of its own.

python examples/generate_medium_gpt2.py medium_gpt2
python examples/benchmark_runner.py baseline medium_gpt2/model.safetensors
python examples/benchmark_runner.py lema medium_gpt2/model.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import Arm, run_arm

KINDS = {"baseline": "peft", "lema": "lema"}
SAYS = ("peak_mib", "floor_mib", "above_floor_mib", "median_step_seconds", "device_peak_mib")


def measure(kind: str, weights: Path, device: str, tokens: int) -> dict[str, Any]:
    """Numbers of a warm-up and one more step; a `SystemExit` says why there are none.

    Args:
        weights: a `.safetensors` file with its config.json beside it, or the folder of both.
    """
    config = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not config.is_file():
        raise SystemExit(f"{config} does not exist: nothing says what model {weights} is")
    with tempfile.TemporaryDirectory() as place:
        folder = weights
        if not weights.is_dir():  # transformers only finds weights by the usual name
            folder = Path(place)
            (folder / "config.json").symlink_to(config.resolve())
            (folder / "model.safetensors").symlink_to(weights.resolve())
        options = {"device": device, "dtype": "float32", "tokens": tokens, "rank": 16, "steps": 2}
        run = run_arm(Arm(kind, KINDS[kind], folder, options), 0, 3600)
    if run.numbers is None:
        raise SystemExit(f"{kind}: {run.failure}")
    return {"kind": kind, "device": device, "tokens": tokens, "loss": run.numbers["losses"][-1]} | {
        name: run.numbers[name] for name in SAYS if name in run.numbers
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print one JSON object; memory is in MiB, `floor_mib` is what importing takes."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("kind", choices=list(KINDS))
    made.add_argument("file", nargs="?", type=Path, help="weights, or their folder")
    made.add_argument("--device", default="cpu")
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--tiny", action="store_true", help="a GPT-2 of four layers, made on the spot")
    given = made.parse_args(arguments)
    if (given.file is None) == (not given.tiny):
        made.error("give either a FILE or --tiny")
    with tempfile.TemporaryDirectory() as place:
        if given.tiny:
            from generate_dummy_gpt2 import SHAPE, generate

            given.file = generate(Path(place), SHAPE)
        numbers = measure(given.kind, given.file, given.device, given.tokens)
    print(json.dumps(numbers))
    return numbers


if __name__ == "__main__":
    main()
