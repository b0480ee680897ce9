"""Model folders: found or made, checked for room, dropped from the page cache, removed.

It knows files and disks; it knows nothing of arms or of what is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .make_model import FILES, NAMES, PRESETS, parameters, shorten
from .processes import NotPrepared, run_module

SPARE_BYTES = 1 << 30
"""Disk to leave free beside a model that is made."""
SMOLLM2 = "smollm2-135m"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def evict(folder: Path) -> None:
    """Ask the kernel to drop the folder's files from the page cache."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only clean pages can be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def weights_bytes(folder: Path) -> int:
    """Bytes of the folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def lacks_room(shape: str, folder: Path, dtype: str = "bfloat16") -> str | None:
    """Why a model of this shape cannot be written under a folder; None if it can."""
    needed = parameters(PRESETS[shape]) * ITEM_BYTES[dtype] + SPARE_BYTES
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free >= needed:
        return None
    return (
        f"the {NAMES[shape]} model and a spare gigabyte take {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free"
    )


def _leave(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that gigabytes are not left behind."""
    sys.exit(128 + number)


@contextlib.contextmanager
def model_folder(
    shape: str,
    given: Path | None = None,
    keep: bool = False,
    dtype: str = "bfloat16",
    device: str = "cpu",
    timeout: float | None = None,
) -> Iterator[Path]:
    """The model's folder, made where it is missing; one made here is removed afterwards unless it is kept.

    Args:
        given: a model's folder, or an empty or missing one to make it in; None: a temporary one.
        device: where the random weights are drawn.
        timeout: seconds that making it may take.

    Raises:
        NotPrepared: the folder holds something else, the disk is too full, or time ran out.
    """
    folder = given.resolve() if given else Path(tempfile.gettempdir())
    ours = given is None or not (folder / "config.json").is_file()
    if ours and given is not None and folder.is_dir() and any(folder.iterdir()):
        raise NotPrepared(f"{folder} has files but no config.json: name a model's folder or an empty one")
    if ours and (reason := lacks_room(shape, folder, dtype)):
        raise NotPrepared(f"{folder}: {reason}; name another place with --folder")
    if given is None:
        folder = Path(tempfile.mkdtemp(prefix="lema-benchmark-"))
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if ours:
            print(f"making the {NAMES[shape]} model ...", file=sys.stderr, flush=True)
            wanted = [shape, str(folder), "--dtype", dtype, "--device", device]
            run_module("benchmarks.make_model", *wanted, timeout=timeout)
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        if ours and not keep:
            for path in [*(folder / name for name in FILES), *folder.glob(f".{FILES[0]}.*.tmp")]:
                path.unlink(missing_ok=True)
            if given is None:
                shutil.rmtree(folder, ignore_errors=True)
        elif given is None:
            print(f"kept: {folder}", file=sys.stderr)


@contextlib.contextmanager
def shortened(whole: Path, counts: Iterable[int]) -> Iterator[dict[int, Path]]:
    """Folders of a model's first so many layers, over the same weights file; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lema-benchmark-", dir=whole.parent) as place:
        folders = {count: Path(place, f"{count}-layers") for count in counts}
        for count, folder in folders.items():
            shorten(whole, folder, count)
        yield folders


@contextlib.contextmanager
def shape_folder(shape: str, given: Path | None, keep: bool, dtype: str) -> Iterator[Path]:
    """The folder of SmolLM2-135M with its own weights, or a `model_folder` of a shape."""
    if shape == SMOLLM2:
        yield given or Path(run_module("benchmarks.demo_folder"))
    else:
        with model_folder(shape, given, keep, dtype) as folder:
            yield folder
