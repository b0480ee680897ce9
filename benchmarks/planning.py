"""What `lema plan` predicts for models and machines that are not here: tables of predictions, nothing is measured.

It knows the models' shapes and the machines' words; every number is the plan's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

MODULE = "benchmarks.planning"
DOCS = Path(__file__).resolve().parents[1] / "docs"
OUT = DOCS / "benchmarks" / "planning.md"
PAGE = DOCS / "planning.md"
BEGIN, END = f"<!-- made by python -m {MODULE} -->", "<!-- end -->"

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads: what the models'
# config.json on the hub says (meta-llama/Llama-2-*-hf).
SHAPES = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32),
    "Llama-2-13B": (5120, 13824, 40, 40, 40),
    "Llama-2-70B": (8192, 28672, 80, 64, 8),
}
CARDS = {"rtx4060-8g": "x8", "rtx3060-12g": "", "rtx4080-16g": "", "rtx4090-24g": ""}
"""Cards, all of the fourth generation of PCIe, and how their lanes are written behind it."""
OWN_LINK = "pcie4"
LINKS = ("pcie3", OWN_LINK, "pcie5")
DISKS = ("3.5GB/s", "7GB/s")
BATCHES = (1, 4, 16, 64)
COLUMNS = ("layers: device / RAM / disk", "activations kept", "head", "VRAM", "RAM", "s/step", "tokens/s", "bound by")

Row = list[object]


def model_config(name: str) -> dict[str, object]:
    """The config.json of a shape."""
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "vocab_size": 32000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan for every machine; write the tables, and their summary into docs/planning.md."""
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    made.add_argument("--cards", nargs="+", choices=list(CARDS), default=list(CARDS))
    made.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    made.add_argument("--disks", nargs="+", default=list(DISKS))
    made.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    made.add_argument("--ram", default="64GB", help="of every machine (default: %(default)s)")
    made.add_argument("--out", type=Path, help="file for the tables; then docs/planning.md stays as it is")
    options = made.parse_args(arguments)
    out = options.out or OUT
    with tempfile.TemporaryDirectory() as folder:
        plans = machines(options, Path(folder))
        text = "\n".join(report(options, plans, batches(options, Path(folder)))) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"written: {out}", file=sys.stderr)
    if options.out is None:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        lines = [BEGIN, "", *summary(options, plans), "", END]
        PAGE.write_text(before + "\n".join(lines) + rest.partition(END)[2], encoding="utf-8")
    return 0


def machines(options: argparse.Namespace, folder: Path) -> dict[tuple[str, str, str, str], Row]:
    """Columns of one row a step by model, card, link and disk."""
    return {
        (name, card, link, disk): planned(
            folder, name, f"{card},ram={options.ram},disk={disk},link={link}{CARDS[card]}"
        )
        for name in options.models
        for card in options.cards
        for link in options.links
        for disk in options.disks
    }


def batches(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows of more and more rows a step on the first card."""
    machine = f"{options.cards[0]},ram={options.ram},disk={options.disks[0]}"
    return [[name, rows, *planned(folder, name, machine, rows)] for name in options.models for rows in options.batches]


def planned(folder: Path, name: str, machine: str, rows: int = 1) -> Row:
    """Columns of one plan; where nothing fits, what would."""
    from lema.config import LemaConfig
    from lema.errors import ConfigError
    from lema.machine.memory import format_bytes
    from lema.planning.hardware import Hardware
    from lema.run.planned import make

    path = folder / name / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(model_config(name)), encoding="utf-8")
    hardware = Hardware.parse(machine)
    config = LemaConfig(
        str(path), device=hardware.device, dtype="bfloat16", lora_rank=16, batch_size=rows, max_seq_length=512,
        ram_budget="auto", vram_budget="auto",
    )  # fmt: skip
    try:
        plan = make(config, hardware).plan
    except ConfigError as error:
        advice = str(error).partition(" Set ")[2].partition(",")[0]
        return [f"does not fit: set {advice}", *["-"] * (len(COLUMNS) - 1)]
    estimate = plan.estimate
    assert estimate is not None
    return [
        f"{len(plan.on_device)} / {len(plan.in_ram)} / {len(plan.from_disk)}",
        len(plan.keep_activations),
        plan.head,
        format_bytes(plan.device_peak),
        format_bytes(plan.host_peak),
        f"{estimate.step_seconds:.3g}",
        f"{estimate.tokens_per_second:,.0f}",
        estimate.bound_by,
    ]


# -- pages -----------------------------------------------------------------------------------------


def report(
    options: argparse.Namespace, plans: dict[tuple[str, str, str, str], Row], larger: list[Row]
) -> Iterator[str]:
    """The lines of the page with every row."""
    yield "# Predicted plans"
    yield ""
    yield "**Every figure on this page is a prediction of `lema plan`. Nothing here was measured.**"
    yield ""
    yield from _prose(
        f"Made by `.venv/bin/python -m {MODULE}`, which plans every row from a `config.json` alone. bfloat16, LoRA of "
        f"rank 16 on all linear layers, 512 tokens a row. Every machine has {options.ram} of RAM; a plan may take nine "
        "tenths of it, and of the card's memory as much. Cards do the share of their data sheets' rates that "
        "`src/lema/planning/hardware.py` says. Links have 16 lanes, that of the 8 GB card 8; all four cards are "
        f"made for {OWN_LINK}, the other links are for comparison."
    )
    for name in options.models:
        rows = [[*key[1:], *row] for key, row in plans.items() if key[0] == name]
        yield from ("", f"## {name}, one row a step", "", *_table(["card", "link", "disk", *COLUMNS], rows))
    if larger:
        yield from ("", "## Larger batches", "")
        yield from _prose(
            "One load of a layer serves all rows of a step: where disk or link bound a step, more rows cost little. "
            f"{options.cards[0]} with its own link, disk {options.disks[0]}."
        )
        yield from ("", *_table(["model", "rows", *COLUMNS], larger))


def summary(options: argparse.Namespace, plans: dict[tuple[str, str, str, str], Row]) -> list[str]:
    """The table of cards with their own link and the slower disk."""
    rows = [
        [name, card, *row]
        for (name, card, link, disk), row in plans.items()
        if link == OWN_LINK and disk == options.disks[0]
    ]
    return _table(["model", "card", *COLUMNS], rows)


def _prose(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]


if __name__ == "__main__":
    sys.exit(main())
