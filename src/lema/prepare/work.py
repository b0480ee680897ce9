"""The folder in which an output grows beside its target: locked, with a journal, renamed into place at the end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..errors import ConfigError, WeightsError
from ..storage.atomic import flush, put_in_place, write_text

_JOB, _JOURNAL, _LOCK, _OUTPUT = "job.json", "done.jsonl", "lock", "output"


class Written(NamedTuple):
    """What the journal knows of a tensor."""

    digest: str
    """Of its bytes."""
    overflowed: int
    """Finite values that became infinite in its type."""


class WorkFolder:
    """`.NAME.prepare` beside the target NAME.

    Layout: `output/` is what becomes the target, `job.json` says what of and how it is made, `done.jsonl` has a line
    for every tensor whose bytes are on the disk, with their digest, and `lock` is held while a process works here.

    Mechanics: a line is added only after the tensor's bytes were flushed, so a line that is there can be trusted as
    far as its digest agrees. A line cut short by a crash is dropped. Another job's folder is emptied first.

    Raises:
        ConfigError: the target has something in it, or another process works on it.
        WeightsError: the folder cannot be made.
    """

    def __init__(self, target: Path, job: dict[str, Any]) -> None:
        self.target = target.absolute()
        self.path = self.target.with_name(f".{self.target.name}.prepare")
        self.output = self.path / _OUTPUT
        check_target(self.target)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WeightsError(
                f"{self.target.parent}: cannot be written: {error.strerror}. Choose another output folder."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(f"{target}: another process is preparing it. Wait for it to end.") from error
        text = json.dumps(job, sort_keys=True, indent=1)
        job_file = self.path / _JOB
        self.restarted = job_file.is_file() and job_file.read_text(encoding="utf-8") != text
        """Whether another job's unfinished work was here, and is gone."""
        if not job_file.is_file() or self.restarted:
            shutil.rmtree(self.output, ignore_errors=True)
            (self.path / _JOURNAL).unlink(missing_ok=True)
            job_file.write_text(text, encoding="utf-8")
        self.output.mkdir(exist_ok=True)
        self.done = _read_journal(self.path / _JOURNAL)
        """What is on the disk, by tensor."""
        write_text(self.path / _JOURNAL, _lines(self.done))  # without a line that was cut short
        self._journal = open(self.path / _JOURNAL, "a", encoding="utf-8")  # noqa: SIM115

    def drop(self, name: str) -> None:
        """Forget a tensor: it has to be written again."""
        del self.done[name]

    def add(self, written: dict[str, Written]) -> None:
        """Note tensors whose bytes are on the disk."""
        try:
            self._journal.write(_lines(written))
            self._journal.flush()
            flush(self.path / _JOURNAL)
        except OSError as error:
            raise WeightsError(f"{self.path}: writing the journal failed: {error.strerror}.") from error
        self.done |= written

    def publish(self) -> None:
        """Flush all, put the output in the target's place in one step, and remove the rest.

        Raises:
            ConfigError: something appeared there meanwhile.
            WeightsError: the disk refuses.
        """
        try:
            put_in_place(self.output, self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise ConfigError(f"{self.target}: something was put there meanwhile.") from error
            raise WeightsError(f"{self.target}: cannot be put in place: {error.strerror}.") from error
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._journal.close()
        os.close(self._lock)


def check_target(target: Path) -> None:
    """Raise `ConfigError` unless the target is absent or an empty directory."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists already. Remove it, or choose another output folder.")


def _lines(written: dict[str, Written]) -> str:
    return "".join(json.dumps([name, *entry]) + "\n" for name, entry in written.items())


def _read_journal(path: Path) -> dict[str, Written]:
    done: dict[str, Written] = {}
    if not path.is_file():
        return done
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            name, digest, overflowed = json.loads(line)
            done[str(name)] = Written(str(digest), int(overflowed))
        except (ValueError, TypeError):  # cut short by a crash: the tensor is written again
            continue
    return done
