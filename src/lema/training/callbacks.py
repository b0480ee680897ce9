"""Callbacks under transformers' event names; its own `TrainerCallback` objects work where they use only these.

It knows events, `args`, `state` and `control`; it knows nothing of what callbacks do.

Events: on_init_end, on_train_begin, on_epoch_begin, on_step_begin, on_step_end, on_log (`logs`), on_evaluate
(`metrics`), on_save, on_epoch_end, on_train_end; each also gets `model`, `processing_class`, `optimizer`. The events
inside a step (on_substep_end, on_pre_optimizer_step, on_optimizer_step) do not happen: a step is one call of the
engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ..coordinator import Coordinator
from ..errors import CallbackError, UnsupportedError
from .state import TrainerControl, TrainerState


class TrainerCallback:
    """What is told of events; override those wanted. Return the control, or None where it was not replaced."""

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Everything is ready; no row has been read."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """The first step comes next."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """A pass over the rows begins."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """A step, with its whole accumulation window, begins."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """A step was taken; it may log, evaluate, save or stop when this returns."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """`logs` are about to be written."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """An evaluation is done; `metrics` has its numbers."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """A checkpoint is there."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """A pass over the rows is done."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """The last step was taken, or the run was stopped."""


class Arguments(SimpleNamespace):
    """All settings as attributes, under Hugging Face's names too."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))

    def to_json_string(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """With plain values only, for trackers."""
        return {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in vars(self).items()}


def arguments(settings: Mapping[str, Any], strategies: Mapping[str, str], ranks: Coordinator) -> Arguments:
    """What callbacks get as `args`: the settings, and their aliases in transformers."""
    values = {
        **settings,
        "per_device_train_batch_size": settings["batch_size"],
        "train_batch_size": settings["batch_size"],
        "logging_strategy": "steps",
        "logging_first_step": False,
        "logging_dir": f"{settings['output_dir']}/runs",
        "save_strategy": "no"
        if settings["save_steps"] <= 0 and settings["save_strategy"] == "steps"
        else settings["save_strategy"],
        "eval_delay": 0,
        "disable_tqdm": True,
        "should_log": ranks.is_writer,
        "should_save": ranks.is_writer,
        "process_index": ranks.rank,
        "local_process_index": ranks.rank,
        "world_size": ranks.world_size,
        **strategies,
    }
    return Arguments(**values)


class Callbacks:
    """Several callbacks, told in order."""

    def __init__(self, callbacks: Sequence[Any], args: Arguments, **always: Any) -> None:
        self._callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self._args = args
        self._always = always

    def fire(self, event: str, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Tell all callbacks of an event; what they ask for is in `control` afterwards.

        Raises:
            CallbackError: one of them raised; those after it are not told.
            UnsupportedError: one asked for the end of the epoch.
        """
        for callback in self._callbacks:
            if (handler := getattr(callback, event, None)) is None:
                continue
            try:
                answer = handler(self._args, state, control, **self._always, **more)
            except Exception as error:  # whatever a user's code raises
                raise CallbackError(
                    f"callback {type(callback).__qualname__} failed in {event} at step {state.global_step}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if answer is not None and answer is not control:
                for name in vars(control):
                    setattr(control, name, getattr(answer, name, getattr(control, name)))
        if control.should_epoch_stop:
            raise UnsupportedError("a callback asked for should_epoch_stop: an epoch cannot be ended early here")
