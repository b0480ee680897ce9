"""The default data set as it was built once, in compressed files beside its generator.

Facts come from data packages whose next versions may say other things; these rows stay as they are, and need none of
them. `python -m lema_reply.pinned` builds them anew.
"""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path

from .build import FEWEST, HELD_OUT, Built, build
from .rows import Row

DEFAULTS = (FEWEST, 0, HELD_OUT)
"""Rows to train on, seed and rows held out of the build that is pinned."""
FOLDER = files(__package__).joinpath("pinned")
TRAIN, HELD_OUT_ROWS = "training_data.jsonl.gz", "held_out.jsonl.gz"


def pinned() -> Built | None:
    """What is pinned; None where the package came without it."""
    if not FOLDER.is_dir():
        return None
    return Built(*(tuple(Row.of_json(line) for line in lines_of(name)) for name in (TRAIN, HELD_OUT_ROWS)))


def lines_of(name: str) -> list[str]:
    """The rows of a pinned file as they are written, without line ends."""
    return gzip.decompress(FOLDER.joinpath(name).read_bytes()).decode("utf-8").splitlines()


def pin(folder: Path) -> None:
    """Build, and write both files; the same rows give the same bytes."""
    built = build()
    for name, rows in ((TRAIN, built.train), (HELD_OUT_ROWS, built.held_out)):
        text = "".join(row.to_json() + "\n" for row in rows)
        (folder / name).write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))


if __name__ == "__main__":
    pin(Path(str(FOLDER)))
