"""Peak memory of training, LEMA beside PEFT: GPT-2, TinyLlama, SmolLM2-1.7B, Llama-2-7B, 128 and 512 tokens.

VRAM on a card, the peak resident set above what importing takes on the CPU.

python examples/kaggle/benchmark_logic.py [--tiny] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Sequence

from comparison import MODELS, Row, compare, parser, table


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure and print the table."""
    given = parser(__doc__, list(MODELS), tokens="128,512", steps=3).parse_args(arguments)
    rows = compare(given)
    memory = {"ram_mib": "RAM, MiB"} if given.device == "cpu" else {"vram_mib": "VRAM, MiB", "ram_mib": "RAM, MiB"}
    print(table(rows, memory))
    return rows


if __name__ == "__main__":
    main()
