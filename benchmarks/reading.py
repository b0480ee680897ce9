"""A whole file read past the page cache, by LEMA's reader or by dd, in its own process; prints one JSON line.

It knows a file and two ways to read it; it knows nothing of models or steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PIECE_BYTES = 8 << 20
RUN_BYTES = 128 << 20
"""Of one job of the reader: about a layer of a 1.7B model."""


def by_reader(file: Path, num_readers: int, slots: int) -> float:
    """Seconds `DiskReader` takes for the file, run after run into a few slots by turns."""
    import torch

    from lema.storage.index import TensorRecord
    from lema.storage.layout import Extent
    from lema.storage.reader import DiskReader, ReadJob
    from lema.storage.views import page_aligned

    size = file.stat().st_size
    record = TensorRecord("all", file, 0, size, torch.uint8, (size,))
    buffers = [memoryview(page_aligned(RUN_BYTES).fill_(1).numpy()) for _ in range(slots)]  # type: ignore[arg-type]
    starts = range(0, size, RUN_BYTES)
    errors: list[BaseException] = []
    left = threading.Semaphore(0)

    def done(error: BaseException | None) -> None:
        errors.extend([error] if error is not None else [])
        left.release()

    reader = DiskReader(num_readers)
    started = time.perf_counter()
    for number, start in enumerate(starts):
        extent = Extent(file, start, min(RUN_BYTES, size - start), 0, (record,))
        reader.submit(ReadJob([extent], buffers[number % slots], lambda: False, done))
    for _ in starts:
        left.acquire()
    seconds = time.perf_counter() - started
    reader.stop()
    if errors:
        raise errors[0]
    assert reader.bytes_read == size
    return seconds


def by_dd(file: Path) -> float:
    """Seconds dd says it took with direct reads of 8 MiB."""
    ended = subprocess.run(
        ["dd", f"if={file}", "of=/dev/null", "iflag=direct", f"bs={PIECE_BYTES}"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    words = ended.stderr.split()  # ... 3.2 GiB) copied, 1.53 s, 2.2 GB/s
    return float(words[words.index("copied,") + 1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every repetition's seconds, and the rate at the median one."""
    from lema.storage.reader import direct_alignment

    file = max(options.folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    if options.kind == "reader":
        seconds = [by_reader(file, options.readers, options.slots) for _ in range(options.repeats)]
    else:
        seconds = [by_dd(file) for _ in range(options.repeats)]
    median = statistics.median(seconds)
    return {
        "arm": options.kind,
        "timed_seconds": [round(value, 6) for value in seconds],
        "median_step_seconds": median,
        "bytes_per_second": file.stat().st_size / median,
        "direct_alignment": direct_alignment(file),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one way and print it."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__.splitlines()[0])
    made.add_argument("kind", choices=("reader", "dd"))
    made.add_argument("--folder", type=Path, required=True, help="the largest weights file there is read")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--readers", type=int, default=2)
    made.add_argument("--slots", type=int, default=2)
    print(json.dumps(measure(made.parse_args(arguments))), flush=True)


if __name__ == "__main__":
    main()
