"""How a run begins: anew, or where another stopped.

It knows checkpoints by name and what they say of themselves; it knows nothing of engines.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..complete import problem_of
from ..errors import CheckpointError, ConfigError
from .checkpoints import CheckpointFolder, read_state
from .metrics import METRICS_FILE, SAMPLES_FILE

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    """None: at the first step."""
    state: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's `trainer_state.json`."""
    messages: list[str] = field(default_factory=list)
    """What was passed over or put aside on the way."""
    began: float = field(default_factory=time.monotonic)
    """When, by the monotonic clock in seconds."""

    @property
    def finished(self) -> bool:
        """Whether the run that saved it had come to its end."""
        return bool(self.state) and bool(self.state["lema"]["run"].get("finished"))


def choose_start(folder: CheckpointFolder, resume: str | os.PathLike[str] | None, look_only: bool = False) -> Start:
    """Where to begin.

    Args:
        resume: `auto`: the newest whole checkpoint, or anew where there is none; a path; `none`: anew, what is
            there is moved aside; None: anew, in a folder without checkpoints.
        look_only: move nothing.

    Raises:
        ConfigError: None is given and there are checkpoints.
        CheckpointError: the checkpoint of a path is not whole.
    """
    if resume is None:
        if there := _there(folder):
            raise ConfigError(
                f"output_dir={str(folder.folder)!r} holds {there[0].name} already: --resume auto goes on from the "
                "newest checkpoint, --resume none puts what is there aside and begins anew"
            )
        return Start()
    if str(resume) == NONE:
        return Start() if look_only else Start(messages=_put_aside(folder))
    if str(resume) != AUTO:
        path = Path(resume)
        state = read_state(path)
        return Start(path, state, [] if look_only else _put_later_aside(folder, path, state["global_step"]))
    problem = None
    found = folder.newest()
    if folder.final.is_dir():
        problem = problem_of(folder.final)
        if problem is None:
            state = read_state(folder.final)
            if found.path is None or read_state(found.path)["global_step"] <= state["global_step"]:
                return Start(folder.final, state)
    messages = [f"passed over {text}" for text in found.passed_over]
    if problem is not None:
        messages.insert(0, f"passed over final: {problem}")
    if found.path is None:
        if messages:
            raise CheckpointError(
                f"no checkpoint in {folder.folder} is whole: {'; '.join(messages)}. --resume none begins anew"
            )
        return Start(messages=["no checkpoint is there yet: the run begins anew"])
    return Start(found.path, read_state(found.path), messages)


def _there(folder: CheckpointFolder) -> list[Path]:
    return [*folder.all(), *([folder.final] if folder.final.is_dir() else [])]


def _put_aside(folder: CheckpointFolder) -> list[str]:
    there = _there(folder)
    if not there:
        return []
    files = [folder.folder / name for name in (METRICS_FILE, SAMPLES_FILE)]
    aside = _move_aside(folder, [*there, *(file for file in files if file.is_file())])
    return [f"{len(there)} checkpoints and the metrics of the run before are in {aside} now"]


def _put_later_aside(folder: CheckpointFolder, start: Path, step: int) -> list[str]:
    """Checkpoints of this folder beyond the one gone on from: they are of a run that is being taken back."""
    if start.absolute().parent != folder.folder.absolute():
        return []
    later = [path for path in folder.all() if int(path.name.rpartition("-")[2]) > step]
    if folder.final.is_dir() and folder.final.absolute() != start.absolute():
        later.append(folder.final)
    if not later:
        return []
    names = ", ".join(path.name for path in later)
    return [f"{names} came after {start.name}, and are in {_move_aside(folder, later)} now"]


def _move_aside(folder: CheckpointFolder, paths: list[Path]) -> Path:
    number = 1
    while (aside := folder.folder / f"previous-{number}").exists():
        number += 1
    aside.mkdir()
    for path in paths:
        os.rename(path, aside / path.name)
    return aside
