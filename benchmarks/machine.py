"""Measures this machine as the memory plan sees it, anew, and prints it as one JSON line.

A process of its own, so that the probe's memory stays out of every arm; arms find the result in the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .processes import run_module


def ask(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """The machine's numbers, and the same in "words", from a process of its own."""
    found: dict[str, Any] = json.loads(run_module("benchmarks.machine", "--folder", str(folder), "--device", device))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.splitlines()[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--folder", type=Path, required=True, help="a model's folder, on the disk to measure")
    options = made.parse_args(arguments)

    from lema.planning.probe import profile

    found = profile(options.device, options.folder, refresh=True)
    print(json.dumps({**json.loads(found.to_json()), "words": str(found)}), flush=True)


if __name__ == "__main__":
    main()
