"""Seconds a training step, LEMA beside PEFT: 20 steps after one that warms up, 512 tokens, TinyLlama and Llama-2-7B.

python examples/kaggle/speed_benchmark.py [--tiny] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Sequence

from comparison import Row, compare, parser, table


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure and print the table, with each arm's time over plain PEFT's where that ran."""
    made = parser(__doc__, ["TinyLlama", "Llama-2-7B"], tokens="512", steps=21)
    rows = compare(made.parse_args(arguments))
    plain = {(row["model"], row["tokens"]): row.get("seconds") for row in rows if row["arm"] == "PEFT"}
    for row in rows:
        base = plain[row["model"], row["tokens"]]
        if base and row.get("seconds"):
            row["over_peft"] = row["seconds"] / base
    print(table(rows, {"seconds": "s/step", "over_peft": "over PEFT"}))
    return rows


if __name__ == "__main__":
    main()
