"""One run from its parts: folder, start, schedule, journal, saver, loop.

It knows which part gets what; each part knows its own subject.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .checkpoints import CheckpointFolder
from .config import TrainingConfig
from .engine import Stream, TrainingEngine
from .journal import Journal, write_json
from .loop import TrainingLoop
from .panel import View
from .progress import Progress
from .reporters import reporting
from .result import FINISHED, TrainResult
from .resume import check_resume, numerics_changed, other_length
from .run_config import RunConfig
from .sampling import Sampler
from .saving import Saver
from .schedule import Schedule
from .start import Start
from .state import TrainerState
from .time_limit import TimeLimit

SUMMARY_FILE = "data_summary.json"


@dataclass(frozen=True)
class RunData:
    """Batches of a run, and what is known of them."""

    train: Stream
    eval: Any = None
    """Batches of one pass each time it is iterated over; None: no evaluation."""
    summary: Mapping[str, Any] | None = None
    """Written to `data_summary.json`."""


def run_training(
    engine: TrainingEngine, data: RunData, config: RunConfig, folder: CheckpointFolder, start: Start,
    schedule: Schedule, *, view: View, sampler: Sampler | None = None,
    write_tokenizer: Callable[[str], Any] | None = None, callbacks: Sequence[Any] = (),
    always: Mapping[str, Any] | None = None,
) -> TrainResult:  # fmt: skip
    """Train from `start` to the end, or to where somebody stops it.

    Args:
        folder: opened, and `start` chosen from it.
        schedule: what `check_start` found.
        write_tokenizer: writes the tokenizer's files into a folder.
        always: what callbacks get with every event.

    Raises:
        CheckpointError: base weights are not those of the checkpoint.
        NonFiniteError: too many steps in a row were not finite.
    """
    training = config.training
    if start.checkpoint is not None and _is_over(start, schedule):
        saved = TrainerState.from_dict(start.state)
        return TrainResult(FINISHED, saved.global_step, start.checkpoint, saved.summary())
    state = TrainerState()
    resolved = config.resolved()
    name = training.run_name or folder.folder.absolute().name
    with contextlib.ExitStack() as end:
        end.enter_context(engine.external_loop(lambda: state.global_step))
        betas = training.adam_beta1, training.adam_beta2
        engine.trainables.set_optimizer(betas, training.adam_epsilon, training.weight_decay)
        state, start = _state(engine, data, config, start, schedule.max_steps)
        progress = _progress(config, schedule, state, data.eval is not None or bool(sampler and sampler.prompts))
        engine.label_smoothing = training.label_smoothing_factor
        end.callback(setattr, engine, "label_smoothing", 0.0)
        writes = engine.coordinator.is_writer
        told = training.report_to if writes else ()
        reporters = end.enter_context(reporting(told, folder.folder, name, resolved.to_dict()))
        if writes:
            start = start.put_aside(folder)
            resolved.save(folder.folder)
            if data.summary is not None:
                write_json(folder.folder / SUMMARY_FILE, data.summary)
        journal = Journal(folder.folder, view, writes)
        end.callback(journal.close)
        saver = Saver(engine, data.train, resolved, schedule, folder, journal, write_tokenizer, _identity(data.eval))
        end.callback(saver.close)
        if start.checkpoint is not None and start.checkpoint.parent.absolute() == folder.folder.absolute():
            saver.last = start.checkpoint
        loop = TrainingLoop(
            engine, data.train, resolved, progress, saver, journal,
            limit=TimeLimit(training.max_train_hours, start.began), eval_stream=data.eval, sampler=sampler,
            callbacks=[*reporters, *callbacks], always=always,
        )  # fmt: skip
        return loop.run(start)


def check_start(data: RunData, config: RunConfig, start: Start) -> Schedule:
    """Whether a run can begin there with these settings and rows; its length and learning rate. Nothing is changed.

    Raises:
        ConfigError: evaluations without rows, or no step.
        CheckpointError: settings, rows or tokenizer are not those of the checkpoint.
    """
    check_evaluation(config.training, data.eval is not None)
    schedule = Schedule.of(config.training, data.train.steps_per_epoch)
    if start.checkpoint is None:
        return schedule
    saved: dict[str, Any] = start.state["lema"]
    check_resume(start.checkpoint, saved["run"]["settings"], config.to_dict())
    done = start.state["global_step"]
    if schedule.max_steps < done:
        raise ConfigError(
            f"{start.checkpoint} has {done} steps, and the run shall have {schedule.max_steps} in all: raise max_steps "
            "or num_train_epochs, or go on from an earlier checkpoint"
        )
    if saved["run"].get("holds_best") and not _is_over(start, schedule):
        raise CheckpointError(f"{start.checkpoint} holds the best adapter, not the last: resume from a checkpoint-N")
    if hasattr(data.train, "check_identity"):
        data.train.check_identity(saved["cursor"])
    if saved["cursor"].get("encoding") != data.train.state_dict().get("encoding"):
        raise CheckpointError(
            f"{start.checkpoint} was trained with another tokenizer or chat template: rows would be read otherwise. "
            "Give those it was trained with (they are in its folder), or start a new run in another output_dir"
        )
    _check_evaluation_data(start.checkpoint, saved.get("evaluation"), data.eval)
    return schedule


def _is_over(start: Start, schedule: Schedule) -> bool:
    """Whether a checkpoint is the end of a run that was no shorter."""
    return start.finished and schedule.max_steps <= start.state["max_steps"]


def check_evaluation(training: TrainingConfig, has_data: bool) -> None:
    """`ConfigError` where evaluations are asked for and there is nothing to evaluate on."""
    if training.wants_best and not has_data:
        raise ConfigError(
            "load_best_model_at_end and early_stopping_patience need evaluation data: set eval_file or eval_size"
        )
    if training.eval_strategy in ("steps", "epoch") and not (has_data or training.sample_prompts):
        raise ConfigError(
            f"eval_strategy={training.eval_strategy} needs evaluation data: set eval_file or eval_size, or "
            "eval_strategy to no"
        )


def _state(
    engine: TrainingEngine, data: RunData, config: RunConfig, start: Start, max_steps: int
) -> tuple[TrainerState, Start]:
    """Put engine and data where the checkpoint was; messages of what may differ in the last bits are added."""
    if start.checkpoint is None:
        return TrainerState(), start
    saved: dict[str, Any] = start.state["lema"]
    data.train.load_state_dict(saved["cursor"])
    state = TrainerState.from_dict(engine.load_checkpoint(start.checkpoint))
    changed = numerics_changed(saved["run"]["numerics"], engine.numerics())
    draws = ", and dropout draws otherwise" if config.lema.lora_dropout and changed and "micro_batch" in changed else ""
    messages = [] if changed is None else [f"numbers may differ in the last bits from here on{draws}: {changed}"]
    longer = other_length(saved["run"]["settings"], config.to_dict(), start.state["max_steps"], max_steps)
    messages += [longer] if longer is not None else []
    return state, dataclasses.replace(start, messages=[*start.messages, *messages])


def _progress(config: RunConfig, schedule: Schedule, state: TrainerState, has_evaluation: bool) -> Progress:
    """What is due when, which the state says too, under transformers' names."""
    progress = Progress(config.training, config.lema.save_steps, schedule, state, has_evaluation)
    state.max_steps, state.num_train_epochs = schedule.max_steps, -(-schedule.max_steps // schedule.steps_per_epoch)
    state.logging_steps, state.eval_steps = config.training.logging_steps, progress.eval_steps
    state.save_steps, state.train_batch_size = config.lema.save_steps, config.lema.batch_size
    return progress


def _identity(batches: Any) -> dict[str, Any] | None:
    """What a checkpoint notes of the data evaluated on; None: there is none, or it cannot say."""
    return batches.identity() if hasattr(batches, "identity") else None


def _check_evaluation_data(checkpoint: Path, noted: Mapping[str, Any] | None, batches: Any) -> None:
    """Evaluations on other rows cannot be compared with those before; where there were none, there may be now."""
    if noted is None:
        return
    if _identity(batches) is None:
        raise CheckpointError(
            f"{checkpoint} was evaluated on {noted['data']['name']}, and now there is no such data: give it as "
            "eval_file (eval_strategy: no leaves evaluations out), or start a new run in another output_dir"
        )
    batches.check_identity(noted)
