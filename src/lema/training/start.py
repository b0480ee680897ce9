"""How a run begins: anew, or where another stopped.

It knows checkpoints by name and what they say of themselves; it knows nothing of engines.
"""

from __future__ import annotations

import os
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
        return Start(path, read_state(path))
    if folder.final.is_dir():
        problem = problem_of(folder.final)
        if problem is None:
            return Start(folder.final, read_state(folder.final))
    else:
        problem = None
    found = folder.newest()
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
    number = 1
    while (aside := folder.folder / f"previous-{number}").exists():
        number += 1
    aside.mkdir()
    files = [folder.folder / name for name in (METRICS_FILE, SAMPLES_FILE)]
    for path in [*there, *(file for file in files if file.is_file())]:
        os.rename(path, aside / path.name)
    return [f"{len(there)} checkpoints and the metrics of the run before are in {aside} now"]
