"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME... [OPTION...]` runs those named.

It knows the names; what is measured, and with which options, is each benchmark's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from . import (
    decoding,
    dial,
    families,
    gpu,
    larger_than_memory,
    memory,
    planning,
    proof,
    published,
    scaling,
    sft_trainer,
    small,
    speed,
)

BENCHMARKS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "decoding": (decoding.main, "codes to values on the CPU, beside bitsandbytes' own functions"),
    "small": (small.main, "135M model in fp32: memory and step time beside PEFT with and without checkpointing"),
    "memory": (memory.main, "peak memory over models and batch shapes, predicted and measured, beside PEFT"),
    "speed": (speed.main, "step time beside PEFT and beside the limits: computation alone, reads alone, dd"),
    "scaling": (scaling.main, "step time and bytes read as micro-batches, layers and tokens grow"),
    "dial": (dial.main, "one dial: step time and peak memory at one budget after another, PEFT at its end"),
    "larger_than_memory": (larger_than_memory.main, "1.7B model in a memory group smaller than its weights (Linux)"),
    "sft_trainer": (sft_trainer.main, "50 losses of a run beside those of TRL's SFTTrainer on plain PEFT"),
    "proof": (proof.main, "a small model learns the [LEMA_REPLY] format by streaming, beside plain PEFT; merged after"),
    "gpu": (gpu.main, "one CUDA card in ten minutes; --device simulated: a dry run on the CPU"),
    "published": (
        published.main,
        "four real models at 128 and 512 tokens beside PEFT, as the original published; a card",
    ),
    "families": (
        families.main,
        "a tiny model of every causal and image-text family of transformers: equal to PEFT, refused, wrong, crash",
    ),
    "planning": (planning.main, "nothing measured: what `lema plan` predicts for Llama 2 on cards of 8 to 24 GB"),
}


def main(arguments: Sequence[str]) -> int:
    """List, or run the named ones one after another; the options after the names go to each of them."""
    names = []
    for argument in arguments:
        if argument.startswith("-"):
            break
        names.append(argument)
    options = arguments[len(names) :]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        for name in unknown:
            print(f"unknown benchmark: {name}", file=sys.stderr)
        print("usage: python -m benchmarks NAME... [OPTION...]   (NAME --help: its options)\n")
        for name, (_, line) in BENCHMARKS.items():
            print(f"  {name:20} {line}")
        return 2 if unknown or options else 0
    return max([BENCHMARKS[name][0](options) for name in names])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
