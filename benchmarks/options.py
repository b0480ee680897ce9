"""Options that benchmarks share, and the command line that says what was in effect.

It knows argparse; it knows nothing of arms or reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .make_model import NAMES, PRESETS
from .processes import ROOT

OUT = ROOT / "docs" / "benchmarks"


def common_options(
    module: str, description: str, pairs: int, steps: int, tokens: int | None = 512
) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; without `--tokens` where a benchmark has lengths of its own."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--pairs", type=int, default=pairs, help="rounds of all arms (default: %(default)s)")
    made.add_argument(
        "--steps", type=int, default=steps, help="steps an arm, the first warms up (default: %(default)s)"
    )
    if tokens is not None:
        made.add_argument("--tokens", type=int, default=tokens, help="a row (default: %(default)s)")
    made.add_argument("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    made.add_argument("--timeout", type=int, default=1800, help="seconds an arm may take (default: %(default)s)")
    made.add_argument("--out", type=Path, default=OUT, help="where the report goes (default: docs/benchmarks)")
    return made


def model_options(made: argparse.ArgumentParser, default: str, *more: str) -> None:
    """Which shape a model of random weights has, or which of `more` it is, and where it lies."""
    made.add_argument(
        "--shape", "--model", choices=[*more, *PRESETS], default=default, help="of the model (default: %(default)s)"
    )
    made.add_argument(
        "--folder", type=Path, help="the model's folder, filled if empty; on a real disk (default: temporary)"
    )
    made.add_argument("--keep", action="store_true", help="do not delete a model made by this run")


def parse(made: argparse.ArgumentParser, arguments: Any) -> argparse.Namespace:
    """The options; a usage message ends the program where numbers make no sense."""
    options = made.parse_args(arguments)
    if options.pairs < 1 or options.steps < 2:
        made.error("--pairs must be 1 or more and --steps 2 or more: the first step only warms up")
    return options


def size(text: str) -> int:
    """Bytes of a size as LEMA's budgets take them, as 1300MB or 1240MiB."""
    from lema.errors import ConfigError
    from lema.machine.memory import parse_bytes

    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def written_size(text: str) -> str:
    """A size as it was written, which is how reports show it."""
    size(text)
    return text


def written_budget(text: str) -> str:
    """A size, or 'auto', as it was written."""
    return text if text == "auto" else written_size(text)


def several(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Items between commas."""

    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(item(part.strip()) for part in text.split(","))

    parse_all.__name__ = f"list of {item.__name__}"
    return parse_all


def command_line(module: str, options: argparse.Namespace) -> str:
    """The command with every setting that was in effect; paths of this machine are left out."""
    words = [f"python -m {module}"]
    for name, value in vars(options).items():
        if isinstance(value, Path) or value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(flag if value is True else f"{flag} {shown}")
    return " ".join(words)


def name_of(benchmark: str, shape: str, default: str) -> str:
    """What a report is called, so that another shape does not replace it."""
    return benchmark if shape == default else f"{benchmark}_{shape}"


def title_of(shape: str) -> str:
    """What a shape is called in a report."""
    return f"{NAMES[shape]} shape" if shape in NAMES else "SmolLM2-135M"
