"""One run of a notebook: its folders, its time, and the verbs it calls.

Where Kaggle keeps outputs and inputs is written here once, and so is what of the time is left.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from lema.errors import CheckpointError, ConfigError, LemaError
from lema.storage.atomic import new_directory, replaced_file

_KAGGLE = Path("/kaggle")
_PREFIX = "LEMA_KAGGLE_"
_SHORTEST = 1 / 60
"""Hours that training gets at least."""
_NUMBER = re.compile(r"checkpoint-(\d+)")


def from_environment(parameters: Mapping[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Parameters of a notebook (names in capitals) that `LEMA_KAGGLE_<NAME>` replaces, in the parameter's own type.

    Raises:
        ConfigError: a text that is none of the type.
    """
    env = os.environ if env is None else env
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        text = env.get(_PREFIX + name)
        if text is None or not name.isupper() or not isinstance(value, str | int | float):
            continue
        try:
            found[name] = text.lower() in ("1", "true", "yes") if isinstance(value, bool) else type(value)(text)
        except ValueError as error:
            raise ConfigError(f"{_PREFIX}{name}={text!r} must be a {type(value).__name__}") from error
    return found


def _work() -> Path:
    return _KAGGLE / "working" if (_KAGGLE / "working").is_dir() else Path.cwd()


def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="lema-"))


@dataclass
class Session:
    """A notebook's run."""

    hours: float
    """From `began` until everything is to be over."""
    began: float
    """Seconds since 1970."""
    work: Path = field(default_factory=_work)
    """What lies here when the notebook ends are its outputs."""
    inputs: Path = _KAGGLE / "input"
    """Outputs of other kernels and data sets that were attached, below their names."""
    scratch: Path = field(default_factory=_scratch)
    """What is not to be an output: converted and merged weights."""
    now: Callable[[], float] = time.time

    @property
    def run_folder(self) -> Path:
        """Checkpoints and metrics of the training."""
        return self.work / "run"

    def hours_taken(self) -> float:
        """Hours since the notebook began."""
        return round((self.now() - self.began) / 3600, 3)

    def hours_for_training(self, reserve: float) -> float:
        """Hours that are left when `reserve` is kept for what comes after; never quite none."""
        return max(self.hours - (self.now() - self.began) / 3600 - reserve, _SHORTEST)

    def lema(self, *words: str | os.PathLike[str], **options: Any) -> str:
        """Run a verb, showing what it prints as it comes; returns that.

        Args:
            options: of `subprocess.Popen`.

        Raises:
            LemaError: it failed.
        """
        return self.python("-m", "lema", *words, **options)

    def lema_in_time(self, *words: str | os.PathLike[str]) -> bool:
        """Run a verb, and give it up when the notebook's time is over; whether it got done.

        Raises:
            LemaError: it failed.
        """
        left = self.hours - (self.now() - self.began) / 3600
        try:
            self.lema(*words, within=max(3600 * left, 1.0))
        except subprocess.TimeoutExpired:
            print(f"given up: the {self.hours:g} hours of this notebook are over", flush=True)
            return False
        return True

    def python(self, *words: str | os.PathLike[str], within: float | None = None, **options: Any) -> str:
        """Run Python likewise; ended after `within` seconds, with `subprocess.TimeoutExpired`."""
        command = [sys.executable, *(os.fspath(word) for word in words)]
        print("$", shlex.join(["python", *command[1:]]), flush=True)
        said, over = [], threading.Event()
        options.setdefault("env", {**os.environ, "TERM": "dumb"})  # logs are read as text
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options
        ) as process:
            assert process.stdout is not None

            def end() -> None:
                over.set()
                process.kill()

            clock = threading.Timer(within or 0, end)
            if within is not None:
                clock.start()
            try:
                for line in process.stdout:
                    said.append(line)
                    print(line, end="", flush=True)
            finally:
                clock.cancel()
        if over.is_set() and within is not None:
            raise subprocess.TimeoutExpired(command, within)
        if process.returncode:
            raise LemaError(f"{shlex.join(command[1:])} ended with status {process.returncode}")
        return "".join(said)

    def recipe(self, name: str) -> Path:
        """A recipe, or a file beside the recipes, of the demonstration."""
        path = Path(str(files("lema_reply.recipes").joinpath(name)))
        if not path.is_file():
            known = ", ".join(sorted(other.name for other in path.parent.iterdir()))
            raise ConfigError(f"there is no recipe {name!r}: {known}")
        return path

    def take_over(self) -> int | None:
        """Put the newest checkpoint of the attached outputs where training goes on from it; returns its step.

        None: there is a newer one here already.

        Raises:
            CheckpointError: none is attached.
        """
        found = [(int(match[1]), path.parent) for path in self.inputs.rglob("trainer_state.json")
                 if (match := _NUMBER.fullmatch(path.parent.name))]  # fmt: skip
        if not found:
            raise CheckpointError(
                f"no checkpoint below {self.inputs}: the kernel gone on from must be attached (lema kaggle build ... "
                "--resume-from OWNER/SLUG) and have stopped before the end of its training, with a checkpoint saved; "
                "without --resume-from training begins anew"
            )
        step, source = max(found)
        target = self.run_folder / source.name
        if target.exists():
            return None
        with new_directory(target) as fresh:
            shutil.copytree(source, fresh, dirs_exist_ok=True)
        for name in ("metrics.jsonl", "data_summary.json"):
            if (source.parent / name).is_file() and not (self.run_folder / name).exists():
                with replaced_file(self.run_folder / name) as aside:
                    shutil.copyfile(source.parent / name, aside)
        return step

    def adapter(self) -> tuple[Path, bool]:
        """What training left: its final adapter or else its newest checkpoint, and whether it finished.

        Raises:
            CheckpointError: it left none.
        """
        if (final := self.run_folder / "final").is_dir():
            return final, True
        saved = [(int(match[1]), path) for path in self.run_folder.glob("checkpoint-*")
                 if (match := _NUMBER.fullmatch(path.name))]  # fmt: skip
        if not saved:
            raise CheckpointError(f"{self.run_folder} has no checkpoint: training was stopped before its first save")
        return max(saved)[1], False
