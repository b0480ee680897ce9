"""The training loop: what happens after each step, and what when something goes wrong.

It knows steps, what is due between them and how to go back to the last good one; it knows nothing of models, of how
a step is computed or of what is in a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LemaError, NonFiniteError, UnsupportedError
from .callbacks import Callbacks, arguments
from .evaluation import evaluate
from .journal import Journal
from .machine import Batch, Machine, Report, Restorable, Stream
from .metrics import TIMELINE_FILE, train_line
from .progress import Progress
from .result import TrainResult
from .run_config import RunConfig
from .sampling import Sampler
from .saving import Saver
from .start import Start
from .state import TrainerControl, TrainerState
from .stop import StepAbandoned, StopSignals


class TrainingLoop:
    """Steps until all are done, somebody stops them or something stops them.

    Args:
        machine: makes the steps.
        stream: their batches.
        eval_stream: batches to evaluate on.
        sampler: answers prompts.
        callbacks: see `lema.training.callbacks`.
        always: what callbacks get with every event besides `model` and `optimizer`.
    """

    def __init__(
        self, machine: Machine, stream: Stream, config: RunConfig, progress: Progress, saver: Saver, journal: Journal,
        *, eval_stream: Any = None, sampler: Sampler | None = None, callbacks: Sequence[Any] = (),
        always: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.machine, self.stream, self.config = machine, stream, config
        self.progress, self.state, self.schedule = progress, progress.state, progress.schedule
        self.saver, self.journal = saver, journal
        self.eval_stream, self.sampler = eval_stream, sampler
        self.control = TrainerControl()
        strategies = {"eval_strategy": progress.eval_strategy}
        self.callbacks = Callbacks(
            callbacks, arguments(config.to_dict(), strategies), model=machine.model, optimizer=machine.optimizer,
            **(always or {}),
        )  # fmt: skip
        self.signals = StopSignals(self._may_leave)
        self._leavable = False
        self._learning_rate = 0.0
        self._grad_norm: float | None = None
        self._report: Report | None = None
        self._data_seconds = 0.0
        self._saved_step = -1
        self._timeline_step = 0
        self._updates = 0
        self._good: tuple[TrainerState, dict[str, Any], Restorable] | None = None
        self._tell("on_init_end")

    # -- the loop --------------------------------------------------------------------------------

    def run(self, start: Start) -> TrainResult:
        """Go through all steps from `start`, whose checkpoint the machine and the stream have taken already."""
        with self.signals:
            try:
                self._begin(start)
                for batch in self._batches():
                    self._step(batch)
                    self._log()
                    self._evaluate()
                    self._save()
            except StepAbandoned:
                self._go_back()
            except (CheckpointError, NonFiniteError):
                raise
            except (LemaError, OSError, RuntimeError, MemoryError):
                self._rescue()
                raise
            return self._interrupted() if self._is_interrupted else self._finish()

    def _begin(self, start: Start) -> None:
        step = self.state.global_step
        self._timeline_step = min(step + 3, self.schedule.max_steps)
        self.journal.view.begin(step, self.schedule.max_steps, self.machine.device)
        for message in start.messages:
            self.journal.event(step, "found", message)
        self._tell("on_train_begin")
        self._remember()
        if start.checkpoint is None:
            if self.journal.goes_on:
                self.journal.event(step, "resumed", "the run before left no checkpoint: begun anew")
            self._sample()
            return
        here = start.checkpoint.absolute() in (
            self.saver.folder.path(step).absolute(),
            self.saver.folder.final.absolute(),
        )
        self._saved_step = step if here else -1
        self._learning_rate = self.machine.set_learning_rate(self.schedule.factor(max(step, 1)))
        self.journal.event(step, "resumed", f"resumed from {start.checkpoint} after step {step}")
        evaluated = self.state.evaluated_step
        self._log()  # what the run before would have done next
        self._evaluate()
        if self.state.evaluated_step != evaluated:
            self._saved_step = -1  # that checkpoint does not know of the evaluation
        self._save()
        if self.progress.patience_is_over:  # stopped between that evaluation and the end
            self.control.should_training_stop = True

    def _batches(self) -> Iterator[Batch]:
        batches = iter(self.stream)
        while not (self.progress.at_end or self._is_interrupted or self.control.should_training_stop):
            self.control.new_step()
            if self.state.global_step % self.schedule.steps_per_epoch == 0:
                self._tell("on_epoch_begin")
            started = time.perf_counter()
            batch = next(batches)
            self._data_seconds = time.perf_counter() - started
            yield batch

    def _step(self, batch: Batch) -> None:
        """One optimizer step, or one skipped because its numbers are not finite or its rows were all dropped."""
        number = self.state.global_step + 1
        self._tell("on_step_begin")
        self._learning_rate = self.machine.set_learning_rate(self.schedule.factor(number))
        started = time.perf_counter()
        loss, skipped = self._attempt(batch, number)
        seconds = time.perf_counter() - started
        state = self.state
        state.global_step, state.epoch = number, number / self.schedule.steps_per_epoch
        state.num_input_tokens_seen += batch.tokens
        state.train_seconds += seconds + self._data_seconds
        if loss is not None:
            self.progress.count_loss(loss, batch.targets)
        if skipped is not None:
            state.nonfinite_steps += batch.targets > 0
            self.journal.event(number, "skipped", f"step {number} was skipped: {skipped}")
        self.journal.step(train_line(
            state, batch, self._report, loss=loss, grad_norm=self._grad_norm,
            learning_rate=self._learning_rate, step_seconds=seconds, data_seconds=self._data_seconds,
            skipped=skipped is not None,
        ))  # fmt: skip
        if state.nonfinite_in_a_row >= self.config.training.max_nonfinite_steps:
            self._give_up(skipped or "")
        self._remember()
        self._tell("on_step_end")
        if self.schedule.ends_epoch(number):
            self._tell("on_epoch_end")

    def _log(self) -> None:
        if self.progress.log_due or self.control.should_log:
            logs = self.progress.entry(self._learning_rate, self._grad_norm)
            self.journal.view.log(logs)
            self._tell("on_log", logs=logs)
            self._remember()

    def _evaluate(self) -> None:
        if self._is_interrupted or not (self.progress.evaluation_due or self.control.should_evaluate):
            return
        step = self.state.global_step
        self.state.evaluated_step = step
        if self.eval_stream is not None:
            with self._may_be_left():
                metrics = evaluate(self.machine, self.eval_stream)
            better = self.progress.take_evaluation(metrics)
            self.control.should_save |= better and self.config.training.wants_best
            self.journal.evaluation(step, self.state.epoch, metrics)
            self._tell("on_log", logs={**metrics, "epoch": self.state.epoch, "step": step})
            self._tell("on_evaluate", metrics=metrics)
            if self.progress.patience_is_over:
                self.journal.event(step, "stopped", f"no better evaluation in {self.state.evaluations_without_better}")
                self.control.should_training_stop = True
        self._sample()
        self._remember()

    def _save(self) -> None:
        step = self.state.global_step
        due = self.progress.save_due or self.control.should_save
        if self.state.nonfinite_in_a_row:
            return  # what comes next may end the run: the last good checkpoint stays the newest
        if due and self._saved_step != step and self.saver.save(self.state):
            self._saved_step = step
            self._tell("on_save")

    # -- the end ---------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        if not self.schedule.ends_epoch(self.state.global_step):
            self.stream.report()
        if self.control.should_training_stop and not self.progress.at_end:
            self.control.should_log = self.state.logged_step != self.state.global_step
            self._log()
        best, holds_best = self.state.best_model_checkpoint, False
        if self.config.training.load_best_model_at_end and self.state.best_global_step != self.state.global_step:
            path = None if best is None else self.saver.folder.folder / Path(best).name
            if path is None or path.name != f"checkpoint-{self.state.best_global_step}" or not path.is_dir():
                message = "the best checkpoint could not be kept: final/ holds the last adapter"
                self.journal.event(self.state.global_step, "best_missing", message)
            else:
                self.machine.load_adapter(path)
                holds_best = True
        final = self.saver.save_final(self.state, holds_best)
        self._tell("on_save")
        self._tell("on_train_end")
        return TrainResult("finished", self.state.global_step, final, self.state.summary())

    def _interrupted(self) -> TrainResult:
        step = self.state.global_step
        if self._saved_step != step and step > 0 and self.saver.save(self.state):
            self._saved_step = step
        path = self.saver.folder.path(step) if self._saved_step == step else self.saver.last
        self.journal.event(step, "interrupted", f"{self.signals.requested}: stopped after step {step}")
        self._tell("on_train_end")
        return TrainResult("interrupted", step, path, self.state.summary())

    # -- when something goes wrong ---------------------------------------------------------------

    def _attempt(self, batch: Batch, number: int) -> tuple[float | None, str | None]:
        """Loss of a step or None, and why there was no update or None."""
        self._grad_norm, self._report = None, None
        if batch.targets == 0:
            return None, "all its rows were dropped"
        try:
            loss = self._timed_step(batch, number)
        except NonFiniteError as error:
            self.state.nonfinite_in_a_row += 1
            return None, str(error)
        self._report = report = self.machine.last_step
        if report.skipped:  # usual in fp16, until the scale has come down
            self.state.nonfinite_in_a_row += self.machine.loss_scale < 1
            return None, f"fp16 overflow, the loss scale is {self.machine.loss_scale:g} now"
        self._grad_norm = report.grad_norm
        return loss, None

    def _timed_step(self, batch: Batch, number: int) -> float:
        loss = None
        with self._may_be_left():
            if number != self._timeline_step:
                return self.machine.train_step(batch.inputs, number)
            try:
                with self.machine.record_step(self.saver.folder.folder / TIMELINE_FILE, number):
                    loss = self.machine.train_step(batch.inputs, number)
            except OSError as error:
                if loss is None:
                    raise
                self.journal.event(number, "not_written", f"{TIMELINE_FILE} could not be written: {error}")
        assert loss is not None
        return loss

    def _give_up(self, reason: str) -> None:
        good = f"the last good checkpoint is {self.saver.last}" if self.saver.last else "nothing was saved before"
        raise NonFiniteError(
            f"training stopped at step {self.state.global_step}: {self.state.nonfinite_in_a_row} steps in a row were "
            f"not finite; {good}. The last one: {reason}"
        )

    def _remember(self) -> None:
        """This is a good place to go back to."""
        state = copy.copy(self.state)
        state.log_history = list(self.state.log_history)
        self._good = state, self.stream.state_dict(), self.machine.random_state()
        self._updates = self.machine.updates

    def _go_back(self) -> None:
        """To the end of the last whole step, after the one under way was left."""
        assert self._good is not None
        state, cursor, random = self._good
        for name, value in vars(state).items():
            setattr(self.state, name, value)
        self.stream.load_state_dict(cursor)
        random.restore()

    def _rescue(self) -> None:
        """Save the last whole step before an error ends the run, if the state still is that step's."""
        if self._good is None or self._is_past_update:
            return
        self._go_back()
        if self.state.global_step not in (0, self._saved_step):
            with contextlib.suppress(LemaError, OSError):  # the error under way comes first; the journal has this one
                self.saver.save(self.state)

    # -- signals and callbacks -------------------------------------------------------------------

    @property
    def _is_interrupted(self) -> bool:
        return self.signals.requested is not None

    def _may_leave(self) -> bool:
        return self._leavable and not self._is_past_update

    @property
    def _is_past_update(self) -> bool:
        """Whether parameters are no longer those of the step that can be gone back to."""
        return self.machine.torn or self.machine.updates != self._updates

    @contextlib.contextmanager
    def _may_be_left(self) -> Iterator[None]:
        self._leavable = True
        try:
            yield
        finally:
            self._leavable = False

    def _tell(self, event: str, **more: Any) -> None:
        self.callbacks.tell(event, self.state, self.control, **more)
        if self.control.should_epoch_stop:
            raise UnsupportedError("a callback asked for should_epoch_stop: an epoch cannot be ended early here")

    # -- what is told ----------------------------------------------------------------------------

    def _sample(self) -> None:
        if self.sampler is not None and self.sampler.prompts:
            with self._may_be_left():
                for prompt, text in self.sampler.answers(self.machine):
                    self.journal.sample(self.state.global_step, prompt, text)
