"""The folder of a run's checkpoints: which there are, which are whole, which may go.

It knows names and completeness; it knows nothing of what is in a checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..json_file import read_object
from ..storage.complete import problem_of

FINAL = "final"
_LOCK = ".lock"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_OF_A_RUN = re.compile(r"\.(tokenizer|run\.yaml|data_summary\.json)\.\d+\.tmp")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final)\..+\.(tmp|old|removed)")


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, and newer ones that are not."""

    path: Path | None
    passed_over: list[str] = field(default_factory=list)
    """Name and what is wrong, the newest first."""


class CheckpointFolder:
    """`checkpoint-N` folders of one run.

    Only one process at a time may hold it, from `open` to `close`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock: int | None = None

    def open(self) -> list[str]:
        """Take the folder, made if missing, and clear what killed saves left; returns what was cleared.

        Raises:
            ConfigError: another process trains in it.
            OSError: it cannot be made or written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock(os.O_RDWR | os.O_CREAT)
        return self._clear_leftovers()

    def look(self) -> list[str]:
        """Whether it could be opened, without making or changing anything.

        Raises:
            ConfigError: another process trains in it, or it is a file, or cannot be made or written.
        """
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            what = "cannot be written" if there.is_dir() else "is not a directory"
            raise ConfigError(f"output_dir={str(self.folder)!r}: {there} {what}; give another output_dir")
        if (self.folder / _LOCK).is_file():
            self._take_lock(os.O_RDWR)
            self.close()
        return []

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step goes."""
        return self.folder / f"checkpoint-{step}"

    @property
    def final(self) -> Path:
        """Where the last save goes."""
        return self.folder / FINAL

    def aside(self, name: str) -> Path:
        """A new folder in here for the time of the run; what a killed run left of it, `open` clears."""
        path = self.folder / f".{name}.{os.getpid()}.tmp"
        path.mkdir(parents=True)
        return path

    def all(self) -> list[Path]:
        """Every folder with a checkpoint's name, whole or not, the newest first."""
        if not self.folder.is_dir():
            return []
        named = [(m, path) for path in self.folder.iterdir() if path.is_dir() and (m := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named, key=lambda pair: -int(pair[0][1]))]

    def newest(self) -> Found:
        """The newest whole checkpoint; every byte of it is compared with what was saved."""
        passed_over: list[str] = []
        for path in self.all():
            problem = problem_of(path)
            if problem is None:
                return Found(path, passed_over)
            passed_over.append(f"{path.name}: {problem}")
        return Found(None, passed_over)

    def rotate(self, limit: int | None, best: str | None, newest: Path | None = None) -> list[Path]:
        """Remove the oldest beyond `limit`, never the newest whole one nor the best; returns what was removed.

        `newest` is the one just written, where that need not be the one of the highest step.

        Folders that are not whole count for nothing and stay, for whoever wants to look into them.
        """
        if limit is None:
            return []
        whole = [path for path in self.all() if problem_of(path, read=False) is None]
        first = [newest] if newest is not None else whole[:1]
        kept: Collection[str] = {path.name for path in first} | ({Path(best).name} if best else set())
        room = limit - len([path for path in whole if path.name in kept])
        removed = []
        for path in whole:
            if path.name in kept:
                continue
            if room > 0:
                room -= 1
            else:
                self._remove(path)
                removed.append(path)
        return removed

    def _take_lock(self, flags: int) -> None:
        self._lock = os.open(self.folder / _LOCK, flags, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"output_dir={str(self.folder)!r} is in use by another run; wait for it, or give another output_dir"
            ) from error

    def _remove(self, path: Path) -> None:
        """Out of sight in one step, so that a kill in between leaves no half of a checkpoint."""
        aside = path.with_name(f".{path.name}.{os.getpid()}.removed")
        os.rename(path, aside)
        shutil.rmtree(aside)

    def _clear_leftovers(self) -> list[str]:
        cleared = []
        for path in sorted(self.folder.iterdir()):
            if _OF_A_RUN.fullmatch(path.name):  # of its time only: nothing is lost with it, and nothing said
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            match = _LEFTOVER.fullmatch(path.name)
            if match is None or not path.is_dir():
                continue
            whole = self.folder / match[1]
            if match[2] == "old" and not whole.exists() and problem_of(path) is None:
                os.rename(path, whole)
                cleared.append(f"{match[1]} was put back, its replacement was never finished")
            else:
                shutil.rmtree(path)
                cleared.append(f"{path.name} of a save that was never finished was removed")
        return cleared


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`trainer_state.json` of a whole checkpoint.

    Raises:
        CheckpointError: it is not whole, or its state is not one of a training run.
    """
    if (problem := problem_of(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {problem}; use an earlier one")
    values = read_object(checkpoint / TRAINER_STATE)
    if not isinstance(own := values.get("lema"), dict) or "run" not in own:
        raise CheckpointError(
            f"{checkpoint} was saved by train_step alone, without a training run around it: load it with "
            "LemaModel.get_trainer(resume_from=...)"
        )
    return values
