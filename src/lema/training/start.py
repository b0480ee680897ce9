"""How a run begins: anew, or where another stopped.

It knows checkpoints by name and what they say of themselves; it knows nothing of engines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..storage.complete import problem_of
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
    aside: tuple[Path, ...] = ()
    """What lies in the run's folder and is not of the run that begins; `put_aside` moves it."""
    why_aside: str = ""
    """Says so, with `{}` for the place it is moved to."""
    began: float = field(default_factory=time.monotonic)
    """When, by the monotonic clock in seconds."""

    def put_aside(self, folder: CheckpointFolder) -> Start:
        """Move what is not of this run, once nothing refuses the run any more; the start that says so."""
        if not self.aside:
            return self
        place = _move_aside(folder, self.aside)
        return replace(self, aside=(), messages=[*self.messages, self.why_aside.format(place)])

    @property
    def finished(self) -> bool:
        """Whether the run that saved it had come to its end."""
        return bool(self.state) and bool(self.state["lema"]["run"].get("finished"))


def choose_start(folder: CheckpointFolder, resume: str | os.PathLike[str] | None) -> Start:
    """Where to begin. Nothing is moved: see `Start.put_aside`.

    Args:
        resume: `auto`: the newest whole checkpoint, or anew where there is none; a path; `none`: anew, what is
            there is moved aside; None: anew, in a folder without checkpoints.

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
        return _anew(folder)
    if str(resume) != AUTO:
        return _given(folder, Path(resume))
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


def _anew(folder: CheckpointFolder) -> Start:
    there = _there(folder)
    files = [folder.folder / name for name in (METRICS_FILE, SAMPLES_FILE)]
    aside = (*there, *(file for file in files if file.is_file())) if there else ()
    return Start(aside=aside, why_aside=f"{len(there)} checkpoints and the metrics of the run before are in {{}} now")


def _given(folder: CheckpointFolder, checkpoint: Path) -> Start:
    """From a checkpoint by its path; those of this folder beyond it are of a run that is being taken back."""
    state = read_state(checkpoint)
    if checkpoint.absolute().parent != folder.folder.absolute():
        return Start(checkpoint, state)
    later = [path for path in folder.all() if int(path.name.rpartition("-")[2]) > state["global_step"]]
    if folder.final.is_dir() and folder.final.absolute() != checkpoint.absolute():
        later.append(folder.final)
    names = ", ".join(path.name for path in later)
    why = f"{names} came after {checkpoint.name}, and are in {{}} now"
    return Start(checkpoint, state, aside=tuple(later), why_aside=why)


def _move_aside(folder: CheckpointFolder, paths: Sequence[Path]) -> Path:
    number = 1
    while (aside := folder.folder / f"previous-{number}").exists():
        number += 1
    aside.mkdir()
    for path in paths:
        os.rename(path, aside / path.name)
    return aside
