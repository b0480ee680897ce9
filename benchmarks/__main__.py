"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME... [OPTION...]` runs those named.

It knows the names; what is measured, and with which options, is each benchmark's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from . import larger_than_memory, small

BENCHMARKS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "small": (small.main, "135M model in fp32: memory and step time beside PEFT with and without checkpointing"),
    "larger_than_memory": (larger_than_memory.main, "1.7B model in a memory group smaller than its weights (Linux)"),
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
