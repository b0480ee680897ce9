"""How fast codes become values on the CPU, by LEMA's codecs and by bitsandbytes' own functions, by turns.

It knows one matrix in several formats; it knows nothing of models or steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .options import OUT
from .processes import Run
from .report import Report, median_of, ratio, write
from .tables import bars

MODULE = "benchmarks.decoding"
RATE = "gb_of_values_per_s"
OURS, THEIRS = "LEMA, {}", "bitsandbytes, {}"
NOTES = (
    "A rate is bytes of decoded bfloat16 values over the time of one call, at the fastest of several calls in a round: "
    "what else runs on the machine then counts least. The arms of a round run one after the other.",
    "Every pair of results is compared bit for bit before anything is timed.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every format; write the report."""
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--rows", type=int, default=8192, help="of the matrix (default: %(default)s)")
    made.add_argument("--columns", type=int, default=2048, help="of the matrix (default: %(default)s)")
    made.add_argument("--threads", type=int, help="that torch computes with (default: its own number)")
    made.add_argument("--rounds", type=int, default=5, help="of all arms (default: %(default)s)")
    made.add_argument("--calls", type=int, default=10, help="in a round (default: %(default)s)")
    made.add_argument("--out", type=Path, default=OUT, help="where the report goes (default: docs/benchmarks)")
    options = made.parse_args(arguments)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    report = Report("decoding", "From codes to values on the CPU", f"python -m {MODULE} {' '.join(given)}".rstrip())
    with tempfile.TemporaryDirectory() as folder:
        arms = _arms(Path(folder), options.rows, options.columns)
        for number in range(options.rounds):
            for label, decode in arms.items():
                rate = 2 * options.rows * options.columns / _fastest(decode, options.calls) / 1e9
                report.runs.append(Run(label, number, 0, {RATE: rate}))
    report.facts["matrix"] = f"{options.rows} x {options.columns}, {torch.get_num_threads()} threads"
    for label in arms:
        report.facts[label] = f"{median_of(report.runs, label, RATE):.2f} GB of values a second"
    for name in ("nf4", "int8"):
        pair = OURS.format(name), THEIRS.format(name)
        report.ratios.append(ratio(report.runs, f"{name}: rate of LEMA's over bitsandbytes'", RATE, *pair))
    report.panels.append(bars(report.runs, "Decoding to bfloat16", "GB/s of values", RATE))
    report.notes += NOTES
    return write(report, options.out)


def _arms(folder: Path, rows: int, columns: int) -> dict[str, Callable[[], Any]]:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
    from safetensors.torch import save_file

    from lema.prepare.encoders import ENCODERS
    from lema.storage.codecs.formats import find_stored
    from lema.storage.index import GlobalBinaryIndex

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    arms: dict[str, Callable[[], Any]] = {}
    for name in ("nf4", "int8"):
        tensors = ENCODERS[name].encode("a.weight", (rows, columns), torch.bfloat16, [weight.view(-1)])
        save_file(tensors, folder / f"{name}.safetensors")
        index = GlobalBinaryIndex(folder / f"{name}.safetensors")
        (stored,) = find_stored({key: index.record(key) for key in index.keys}, None).values()
        values = [tensors[run.record.name].reshape(-1) for run in stored.codec.runs]
        out = torch.empty(rows, columns, dtype=torch.bfloat16)

        def ours(codec: Any = stored.codec, values: Any = values, out: Any = out) -> Any:
            codec.decode(values, out)
            return out

        if name == "nf4":
            beside = {key.removeprefix("a.weight."): tensor for key, tensor in tensors.items() if key != "a.weight"}
            state = QuantState.from_dict(dict(beside), torch.device("cpu"))

            def theirs(codes: Any = tensors["a.weight"], state: Any = state) -> Any:
                return dequantize_4bit(codes, state)
        else:

            def theirs(codes: Any = tensors["a.weight"], state: Any = tensors["a.SCB"]) -> Any:
                return int8_vectorwise_dequant(codes, state).bfloat16()

        if not torch.equal(ours(), theirs()):
            raise SystemExit(f"{name}: LEMA and bitsandbytes decode to different values on this processor")
        arms |= {OURS.format(name): ours, THEIRS.format(name): theirs}
    return arms


def _fastest(decode: Callable[[], Any], calls: int) -> float:
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        decode()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
