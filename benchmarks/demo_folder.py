"""Prints the folder of the demonstration model, converting it first if need be.

A process of its own, so that torch and the conversion's memory stay out of the benchmark's.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] = ()) -> None:
    """Print the folder."""
    from lema.prepare.demo_model import smollm2_folder

    print(smollm2_folder())


if __name__ == "__main__":
    main()
