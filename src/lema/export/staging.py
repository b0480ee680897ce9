"""A directory in the making: beside its target, kept after a failure, continued by the next run for the same thing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeightsError
from ..storage.atomic import flush, put_in_place, write_text

_STATE = ".state.json"
_LOCK = ".lock"


class Staging:
    """The working directory of one target, and what is finished in it.

    Layout: `.NAME.partial` beside the target NAME; in it the finished files, a state file with the fingerprint
    of what they were made from and the files that are elsewhere already, and a lock.
    """

    def __init__(self, target: Path, folder: Path, state: dict[str, Any]) -> None:
        self.target, self.folder, self._state = target, folder, state

    @property
    def elsewhere(self) -> dict[str, Any]:
        """Notes on files that were finished and taken away, by name."""
        notes: dict[str, Any] = self._state["elsewhere"]
        return notes

    def note(self, name: str, value: Any) -> None:
        """Remember that a file is finished and elsewhere; on disk before this returns."""
        self.elsewhere[name] = value
        self.save()

    def mark(self, word: str) -> None:
        """Remember that something was done; on disk before this returns."""
        self._state["marks"] = [*self._state.get("marks", []), word]
        self.save()

    def marked(self, word: str) -> bool:
        """Whether this or an earlier run marked it."""
        return word in self._state.get("marks", [])

    def has(self, name: str) -> bool:
        """Whether a file is finished, here or elsewhere. Files appear here only when complete."""
        return name in self.elsewhere or (self.folder / name).is_file()

    def publish(self) -> Path:
        """Make the directory the target. It is complete; everything in it is on disk."""
        try:
            put_in_place(self.folder, self.target)
        except OSError as error:
            raise WeightsError(
                f"{self.target}: cannot be put in place: {error.strerror}. See {self.folder}."
            ) from error
        for name in (_STATE, _LOCK):  # only now: until the rename they are what a later run goes on from
            (self.target / name).unlink(missing_ok=True)
        flush(self.target)
        return self.target

    def save(self) -> None:
        """Bring the state to the disk."""
        write_text(self.folder / _STATE, json.dumps(self._state, indent=2), durable=True)


@contextlib.contextmanager
def staged(target: Path, made_from: Mapping[str, Any]) -> Iterator[Staging]:
    """A working directory for a target; what an earlier run finished from the same sources is still there.

    Args:
        target: must not exist, or be an empty directory.
        made_from: JSON-ready; whatever decides the content of the files.

    Raises:
        ConfigError: the target has something in it, or another process is at work on it.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists already. Remove it, or choose another place.")
    folder = target.with_name(f".{target.name}.partial")
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{target}: another process is making it, in {folder}. Let it end.") from error
        state = _read_state(folder / _STATE)
        if state.get("fingerprint") != fingerprint:
            _clear(folder, keep=_LOCK)
            state = {"fingerprint": fingerprint, "elsewhere": {}}
        for leftover in folder.glob(".*.tmp"):  # of a writer that was killed
            leftover.unlink()
        staging = Staging(target, folder, state)
        staging.save()
        yield staging


def _read_state(path: Path) -> dict[str, Any]:
    """The state a run left; an unreadable one is none, and the work begins anew."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("elsewhere"), dict) else {}


def _clear(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()
