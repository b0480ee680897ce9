"""The training loop: what happens after each step, and what when something goes wrong.

It knows steps, what is due between them and how to go back to the last good one; it knows nothing of models, of how
a step is computed or of what is in a checkpoint.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..coordinator import StepAbandoned
from ..errors import CheckpointError, LemaError, NonFiniteError
from .callbacks import Callbacks, arguments
from .engine import Batch, Stream, TrainingEngine
from .evaluation import evaluate
from .journal import Journal
from .metrics import TIMELINE_FILE, train_line
from .progress import Progress
from .result import FINISHED, INTERRUPTED, STOPPED, TrainResult
from .rollback import Rollback
from .run_config import RunConfig
from .sampling import Sampler
from .saving import Saver
from .start import Start
from .state import TrainerControl
from .step_runner import StepRunner
from .stop import StopSignals
from .time_limit import TimeLimit

OUT_OF_TIME = "out of time"
"""Why a run stops that no signal stops."""


class TrainingLoop:
    """Steps until all are done, somebody stops them or something stops them.

    Args:
        engine: makes the steps; what its ranks do not all see, its coordinator settles.
        stream: their batches.
        limit: of the time the run may take.
        eval_stream: batches to evaluate on.
        sampler: answers prompts.
        callbacks: see `lema.training.callbacks`.
        always: what callbacks get with every event besides `model` and `optimizer`.
    """

    def __init__(
        self, engine: TrainingEngine, stream: Stream, config: RunConfig, progress: Progress, saver: Saver,
        journal: Journal, *, limit: TimeLimit, eval_stream: Any = None, sampler: Sampler | None = None,
        callbacks: Sequence[Any] = (), always: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.stream, self.config = engine, stream, config
        self.coordinator = engine.coordinator
        self.progress, self.state, self.schedule = progress, progress.state, progress.schedule
        self.saver, self.journal = saver, journal
        self.eval_stream, self.sampler = eval_stream, sampler
        self.control = TrainerControl()
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.coordinator.is_writer
        strategies = {"eval_strategy": progress.eval_strategy}
        args = arguments(config.to_dict(), strategies, self.coordinator)
        self.callbacks = Callbacks(callbacks, args, model=engine.model, optimizer=engine.optimizer, **(always or {}))
        self.signals = StopSignals()
        self.limit = limit
        self._stop: str | None = None
        """Why the run ends before its end; all ranks know the same."""
        self._late = False
        """Whether this rank is out of time."""
        self._rollback = Rollback(engine, stream, self.state)
        timeline = saver.folder.folder / TIMELINE_FILE
        self._steps = StepRunner(engine, self.state, journal, timeline, self._abandonable)
        self._learning_rate = 0.0
        self._grad_norm: float | None = None
        self._data_seconds = 0.0
        self._saved_step = -1
        self._fire("on_init_end")

    # -- the loop --------------------------------------------------------------------------------

    def run(self, start: Start) -> TrainResult:
        """Go through all steps from `start`, whose checkpoint the engine and the stream have taken already."""
        with self.signals:
            try:
                try:
                    self._begin(start)
                    for batch in self._batches():
                        self._step(batch)
                        self._log()
                        self._evaluate()
                        self._save()
                except StepAbandoned:
                    self.coordinator.abandon("step")
                    if not self._rollback.go_back():
                        raise
                return self._stopped() if self._is_stopping() else self._finish()
            except (CheckpointError, NonFiniteError):
                raise
            except Exception:
                self._rescue()
                raise

    def _begin(self, start: Start) -> None:
        step = self.state.global_step
        if self.coordinator.is_writer:
            self._steps.recorded = min(step + 3, self.schedule.max_steps)
        self.journal.view.begin(step, self.schedule.max_steps, str(self.engine.device))
        for message in start.messages:
            self.journal.event(step, "found", message)
        self._fire("on_train_begin")
        self._rollback.remember()
        if start.checkpoint is None:
            if self.journal.resumed:
                self.journal.event(step, "resumed", "the run before left no checkpoint: begun anew")
            self._sample()
            return
        own = self.saver.folder.path(step).absolute(), self.saver.folder.final.absolute()
        self._saved_step = step if start.checkpoint.absolute() in own else -1
        self._learning_rate = self.engine.trainables.set_learning_rate(self.schedule.factor(max(step, 1)))
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
        while not (self.progress.at_end or self._is_stopping() or self._wanted("training_stop")):
            if not self._in_time("step"):
                return
            self.control.new_step()
            if self.state.global_step % self.schedule.steps_per_epoch == 0:
                self._fire("on_epoch_begin")
            started = time.perf_counter()
            batch = next(batches)
            self._data_seconds = time.perf_counter() - started
            yield batch

    def _step(self, batch: Batch) -> None:
        """One optimizer step, or one skipped because its numbers are not finite or its rows were all dropped."""
        number = self.state.global_step + 1
        self._fire("on_step_begin")
        self._learning_rate = self.engine.trainables.set_learning_rate(self.schedule.factor(number))
        started = time.perf_counter()
        with self.limit.timed("step"):
            outcome = self._steps.make(batch, number)
        self._grad_norm = outcome.grad_norm
        seconds = time.perf_counter() - started
        state = self.state
        state.global_step, state.epoch = number, number / self.schedule.steps_per_epoch
        state.num_input_tokens_seen += outcome.counts.tokens
        state.train_seconds += seconds + self._data_seconds
        if outcome.loss is not None:
            self.progress.count_loss(outcome.loss, outcome.counts.targets)
        if outcome.skipped is not None:
            state.nonfinite_steps += outcome.counts.targets > 0
            self.journal.event(number, "skipped", f"step {number} was skipped: {outcome.skipped}")
        self.journal.step(train_line(
            state, outcome.counts, outcome.report, loss=outcome.loss, grad_norm=outcome.grad_norm,
            learning_rate=self._learning_rate, step_seconds=seconds, data_seconds=self._data_seconds,
            skipped=outcome.skipped is not None,
        ))  # fmt: skip
        if state.nonfinite_in_a_row >= self.config.training.max_nonfinite_steps:
            self._give_up(outcome.skipped or "")
        self._rollback.remember()
        self._fire("on_step_end")
        if self.schedule.ends_epoch(number):
            self._fire("on_epoch_end")

    def _log(self) -> None:
        if self._wanted("log", self.progress.log_due):
            logs = self.progress.entry(self._learning_rate, self._grad_norm)
            self.journal.view.log(logs)
            self._fire("on_log", logs=logs)
            self._rollback.remember()

    def _evaluate(self) -> None:
        due = self._wanted("evaluate", self.progress.evaluation_due)
        if self._is_stopping() or not due or not self._in_time("evaluation"):
            return
        self.state.evaluated_step = self.state.global_step
        with self.limit.timed("evaluation"):
            if self.eval_stream is not None:
                self._measure()
            self._sample()
        self._rollback.remember()

    def _measure(self) -> None:
        """Loss and accuracy on the evaluation data, and what follows from them."""
        step = self.state.global_step
        with self._abandonable():
            metrics = evaluate(self.engine, self.eval_stream, self._leave_if_late)
        better = self.progress.take_evaluation(metrics)
        self.control.should_save |= better and self.config.training.wants_best
        self.journal.evaluation(step, self.state.epoch, metrics)
        self._fire("on_log", logs={**metrics, "epoch": self.state.epoch, "step": step})
        self._fire("on_evaluate", metrics=metrics)
        if self.progress.patience_is_over:
            self.journal.event(step, "stopped", f"no better evaluation in {self.state.evaluations_without_better}")
            self.control.should_training_stop = True

    def _save(self) -> None:
        step = self.state.global_step
        due = self._wanted("save", self.progress.save_due)
        if self.state.nonfinite_in_a_row:
            return  # what comes next may end the run: the last good checkpoint stays the newest
        if due and self._saved_step != step:
            with self.limit.timed("save"):
                saved = self._saves()
            if saved:
                self._fire("on_save")

    def _saves(self) -> bool:
        """Write this step's checkpoint; whether that was done."""
        saved = self.saver.save(self.state)
        if saved:
            self._saved_step = self.state.global_step
        return saved

    # -- the end ---------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        if not self.schedule.ends_epoch(self.state.global_step):
            self.stream.report()
        if not self.progress.at_end:
            self.control.should_log = self.state.logged_step != self.state.global_step
            self._log()
        best, holds_best = self.state.best_model_checkpoint, False
        if self.config.training.load_best_model_at_end and self.state.best_global_step != self.state.global_step:
            path = None if best is None else self.saver.folder.folder / Path(best).name
            there = path is not None and self.coordinator.broadcast("best checkpoint", path.is_dir())
            if path is None or path.name != f"checkpoint-{self.state.best_global_step}" or not there:
                message = "the best checkpoint could not be kept: final/ holds the last adapter"
                self.journal.event(self.state.global_step, "best_missing", message)
            else:
                self._rollback.forget()
                self.engine.load_adapter(path)
                holds_best = True
        final = self.saver.save_final(self.state, holds_best)
        self._rollback.forget()  # nothing is left to be rescued
        self._fire("on_save")
        self._fire("on_train_end")
        return TrainResult(FINISHED, self.state.global_step, final, self.state.summary())

    def _stopped(self) -> TrainResult:
        """By a signal or the limit of time: to be gone on with later."""
        step = self.state.global_step
        whole = self._saved_step == step or (step > 0 and self._saves())
        path = self.saver.folder.path(step) if whole else self.saver.last
        event, status = ("out_of_time", STOPPED) if self._stop == OUT_OF_TIME else ("interrupted", INTERRUPTED)
        reason = f"max_train_hours={self.limit.hours:g}" if status == STOPPED else self._stop
        self.journal.event(step, event, f"{reason}: stopped after step {step}")
        self._fire("on_train_end")
        return TrainResult(status, step, path, self.state.summary())

    # -- when something goes wrong ---------------------------------------------------------------

    def _give_up(self, reason: str) -> None:
        good = f"the last good checkpoint is {self.saver.last}" if self.saver.last else "nothing was saved before"
        raise NonFiniteError(
            f"training stopped at step {self.state.global_step}: {self.state.nonfinite_in_a_row} steps in a row were "
            f"not finite; {good}. The last one: {reason}"
        )

    def _rescue(self) -> None:
        """Save the last whole step before an error ends the run, if the state still is that step's. Other ranks are not
        asked: they end as well, or will."""
        writes = self.coordinator.is_writer
        if writes and self._rollback.go_back() and self.state.global_step not in (0, self._saved_step):
            with contextlib.suppress(LemaError, OSError):  # the error under way comes first; the journal has this one
                self.saver.save(self.state, together=False)

    # -- signals and callbacks -------------------------------------------------------------------

    def _is_stopping(self) -> bool:
        own = self.signals.requested or (OUT_OF_TIME if self._late else None)
        self._stop = self.coordinator.agree("stop", own)
        return self._stop is not None

    def _in_time(self, *kinds: str) -> bool:
        """Whether there is time for one more of these and the save after it; if not, the run is stopping."""
        self._late = self.coordinator.agree("out of time", self._late or not self.limit.allows(*kinds, "save"))
        return not self._late

    def _wanted(self, what: str, due: bool = False) -> bool:
        """Whether something is due, or a callback of any rank asks for it."""
        return self.coordinator.agree(what, due or getattr(self.control, f"should_{what}"))

    def _leave_if_late(self) -> None:
        """End an evaluation for which there is no time: ranks have different numbers of batches, so that none is asked
        between them."""
        self._late = not self.limit.allows("save")
        if self._late:
            raise StepAbandoned

    @contextlib.contextmanager
    def _abandonable(self) -> Iterator[None]:
        """A block that a second signal to any rank leaves, unless parameters change already. Nobody goes on behind it
        before all have come out."""
        with self.signals.abandonable(lambda: not self._rollback.is_past):
            yield
        self.coordinator.meet("end of a block")

    def _fire(self, event: str, **more: Any) -> None:
        self.callbacks.fire(event, self.state, self.control, **more)

    # -- what is told ----------------------------------------------------------------------------

    def _sample(self) -> None:
        if self.sampler is not None and self.sampler.prompts:
            with self._abandonable():
                for prompt, text in self.sampler.answers(self.engine):
                    self.journal.sample(self.state.global_step, prompt, text)
