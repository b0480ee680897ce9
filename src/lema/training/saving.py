"""Saves of a run: what is in a checkpoint besides the engine's state, and what happens when one cannot be written.

It knows files and the folder of checkpoints; it knows nothing of steps or of when to save.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoints import CheckpointFolder
from .engine import Stream, TrainingEngine
from .journal import Journal
from .run_config import RunConfig
from .schedule import Schedule
from .state import TrainerState


class Saver:
    """Writes checkpoints of one run, on the first of its ranks; what came of it they all know.

    Args:
        write_tokenizer: writes the tokenizer's files into a folder; asked once, the files are copied from then on.
        evaluation: what identifies the data evaluated on, JSON-ready.
    """

    def __init__(
        self, engine: TrainingEngine, stream: Stream, config: RunConfig, schedule: Schedule, folder: CheckpointFolder,
        journal: Journal, write_tokenizer: Callable[[str], Any] | None, evaluation: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._stream = stream
        self._config = config
        self._schedule = schedule
        self._journal = journal
        self._evaluation = evaluation
        self.folder = folder
        self.last: Path | None = None
        """The newest whole checkpoint."""
        self._coordinator = engine.coordinator
        self._tokenizer = folder.aside("tokenizer") if self._coordinator.is_writer else None
        if write_tokenizer is not None and self._tokenizer is not None:
            write_tokenizer(str(self._tokenizer))

    def save(self, state: TrainerState, together: bool = True) -> bool:
        """Write the checkpoint of this step; False if it could not be written and that is to be lived with.

        Args:
            together: False: the other ranks are gone, or are not asked.

        Raises:
            CheckpointError: it could not be written, and `on_save_error` is stop.
        """
        path = self.folder.path(state.global_step)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(path)
        problem = self._problem_of(path, state, together, finished=False)
        if problem is not None:
            if state.best_model_checkpoint == str(path):
                state.best_model_checkpoint = None
            self._failed(path, state, problem, stop=self._config.training.on_save_error == "stop")
            return False
        self.last = path
        self._journal.event(state.global_step, "saved", f"saved {path}")
        if self._coordinator.is_writer:
            limit = self._config.training.save_total_limit
            for removed in self.folder.rotate(limit, state.best_model_checkpoint, path):
                self._journal.event(state.global_step, "removed", f"removed {removed}, beyond save_total_limit")
        return True

    def save_final(self, state: TrainerState, holds_best: bool) -> Path:
        """Write `final/`, the last save; `CheckpointError` if that fails."""
        path = self.folder.final
        problem = self._problem_of(path, state, together=True, finished=True, holds_best=holds_best)
        if problem is not None:
            self._failed(path, state, problem, stop=True)
        self._journal.event(state.global_step, "saved", f"saved {path}")
        return path

    def close(self) -> None:
        """Remove the tokenizer's copy."""
        if self._tokenizer is not None:
            shutil.rmtree(self._tokenizer, ignore_errors=True)

    def _problem_of(self, path: Path, state: TrainerState, together: bool, **facts: bool) -> OSError | None:
        """Write, where this rank does; why it could not be done."""
        problem: OSError | None = None
        if self._coordinator.is_writer:
            try:
                self._write(path, state, **facts)
            except OSError as error:
                problem = error
        return self._coordinator.broadcast("saved", problem) if together else problem

    def _write(self, path: Path, state: TrainerState, **facts: bool) -> None:
        schedule = self._schedule.to_dict(state.global_step)
        values = state.to_dict()
        values["lema"] |= {
            "run": {
                "settings": self._config.to_dict(), "numerics": self._engine.numerics(), "schedule": schedule, **facts,
            },
            "cursor": self._stream.state_dict(),
            "evaluation": self._evaluation,
        }  # fmt: skip

        def more(inside: Path) -> None:
            if self._tokenizer is not None:
                shutil.copytree(self._tokenizer, inside, dirs_exist_ok=True)
            self._config.save(inside)
            (inside / "scheduler.json").write_text(json.dumps(schedule, indent=2) + "\n", encoding="utf-8")

        self._engine.save_checkpoint(path, values, more)

    def _failed(self, path: Path, state: TrainerState, error: OSError, stop: bool) -> None:
        kept = f"the one before, {self.last}, stays" if self.last else "there is none before it"
        message = f"{path} could not be written: {error}; {kept}"
        self._journal.event(state.global_step, "save_failed", message)
        if stop:
            raise CheckpointError(f"{message}. Make room and go on with --resume auto") from error
