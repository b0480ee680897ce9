"""How a step grows: with micro-batches a load, with layers, with the length of rows; in seconds and in bytes read.

It knows which number is turned and what must not grow; it does not know how an arm measures itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from .folders import evict, model_folder, shortened
from .make_model import PRESETS
from .options import command_line, common_options, model_options, name_of, parse, several, title_of
from .plots import Panel
from .processes import Arm, Option, alternate
from .report import Check, Ratio, Report, Table, median_of, ratio, write
from .tables import EVICTED, RANDOM_WEIGHTS, SECONDS

MODULE = "benchmarks.scaling"
BYTES, LOADS = "engine_bytes_per_step", "loads_per_step"
ROWS, LAYERS, TOKENS = "micro-batches", "layers", "tokens"
NOTES = (
    "One step is one optimizer step. Micro-batches: so many rows a step, one row at a time inside each layer, so that "
    "one load of a layer serves all of them.",
    "Bytes are the engine's count of weights it read in the timed steps; the first step of an arm is not counted.",
    "Layers: the same weights file, of which the model has the first so many layers.",
    EVICTED,
    RANDOM_WEIGHTS,
)


def label(turned: str, value: int) -> str:
    """Of one point."""
    return f"{value} {turned}"


def same(report: Report, turned: str, values: Sequence[int]) -> Check:
    """Whether bytes a step are the same at every point."""
    claim = f"bytes read an optimizer step do not grow with {turned} ({', '.join(map(str, values))})"
    found = [median_of(report.runs, label(turned, value), BYTES) for value in values]
    known = [size for size in found if size is not None]
    if len(known) < len(values):
        return Check(claim, None, "an arm did not finish")
    return Check(claim, max(known) <= known[0], ", ".join(f"{size / 1e6:.3f}" for size in known) + " MB")


def straight(report: Report, values: Sequence[int], slots: int, head_bytes: int) -> Check:
    """Whether every further layer adds the same bytes, apart from the head, which streams once it is a small part."""
    claim = "every further layer adds the same bytes to a step, the head's own reads set aside"
    known = {}
    for value in values:
        size, loads = (median_of(report.runs, label(LAYERS, value), key) for key in (BYTES, LOADS))
        if size is not None and loads is not None:
            of_the_head = loads - 2 * max(value - slots, 0)
            known[value] = size - of_the_head * head_bytes
    if len(known) < max(len(values), 3):
        return Check(claim, None, "fewer than three points")
    points = list(known.items())
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    return Check(claim, max(slopes) - min(slopes) < 1, ", ".join(f"{slope / 1e6:.3f}" for slope in slopes) + " MB")


def _head_bytes(shape: str) -> int:
    return int(PRESETS[shape]["vocab_size"] * PRESETS[shape]["hidden_size"] * 2)  # bf16


def judge(report: Report, points: dict[str, tuple[int, ...]], options: argparse.Namespace) -> None:
    """Ratios, claims, tables and plot."""
    runs = report.runs
    for turned, values in points.items():
        low, high = label(turned, values[0]), label(turned, values[-1])
        grown = ratio(runs, f"step time, {high} / {low}", SECONDS, high, low)
        report.ratios.append(grown)
        if turned != LAYERS:
            factor = values[-1] / values[0]
            each = tuple(value / factor for value in grown.pairs)
            report.ratios.append(Ratio(f"step time a token, {high} / {low}", each))
        rows = []
        for value in values:
            seconds, size = (median_of(runs, label(turned, value), key) for key in (SECONDS, BYTES))
            tokens = {ROWS: value * options.tokens, LAYERS: options.tokens, TOKENS: value}[turned]
            loads, waited = (median_of(runs, label(turned, value), key) for key in (LOADS, "waiting_share"))
            rate = tokens / seconds if seconds else None
            rows.append([value, seconds, rate, None if size is None else size / 1e6, loads, waited])
        head = [turned, "s/step", "tokens/s", "MB read a step", "loads a step", "waiting share"]
        report.tables.append(Table(f"As {turned} grow", head, rows))
        times, sizes = ({row[0]: row[column] for row in rows} for column in (1, 3))
        report.panels += [
            Panel(f"Step time over {turned}", turned, "s/step", {"LEMA": times}, logarithmic=turned != LAYERS),
            Panel(f"Bytes read over {turned}", turned, "MB a step", {"LEMA": sizes}, logarithmic=turned != LAYERS),
        ]
    report.checks = [
        same(report, ROWS, points[ROWS]),
        same(report, TOKENS, points[TOKENS]),
        straight(report, points[LAYERS], options.slots, _head_bytes(options.shape)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "step time and bytes over micro-batches, layers and tokens", 2, 4, tokens=128)
    model_options(made, "1.7b")
    made.add_argument("--micro-batches", type=several(int), default=(1, 2, 4, 8, 16), help="rows a step")
    made.add_argument("--layers", type=several(int), default=(4, 8, 16, 24), help="of the model")
    made.add_argument("--lengths", type=several(int), default=(128, 256, 512, 1024), help="tokens of a row")
    made.add_argument("--base-layers", type=int, default=8, help="layers where something else is turned")
    made.add_argument("--slots", type=int, default=2, help="units of weights in memory at once")
    made.add_argument("--chunk", type=int, default=128, help="target positions a piece of the loss")
    options = parse(made, arguments)
    counts = sorted({options.base_layers, *options.layers})
    if counts[-1] > PRESETS[options.shape]["num_hidden_layers"]:
        made.error(f"the shape has fewer layers than {counts[-1]}")
    points = {ROWS: options.micro_batches, LAYERS: options.layers, TOKENS: options.lengths}
    name = name_of("scaling", options.shape, "1.7b")
    report = Report(name, f"How a step grows: {title_of(options.shape)}, CPU", command_line(MODULE, options))
    with model_folder(options.shape, options.folder, options.keep) as whole, shortened(whole, counts) as cut:
        settings: dict[str, Option] = {
            "dtype": "bfloat16", "rank": options.rank, "steps": options.steps, "slots": options.slots,
            "chunk": options.chunk, "tokens": options.tokens, "set": ["micro_batch_size=1"],
        }  # fmt: skip
        base = cut[options.base_layers]
        arms = [Arm(label(ROWS, n), "lema", base, {**settings, "batch": n}) for n in options.micro_batches]
        arms += [Arm(label(LAYERS, n), "lema", cut[n], settings) for n in options.layers]
        arms += [Arm(label(TOKENS, n), "lema", base, {**settings, "tokens": n}) for n in options.lengths]
        report.runs = list(alternate(arms, options.pairs, options.timeout, lambda arm: evict(arm.folder)))
    judge(report, points, options)
    report.notes = list(NOTES)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
