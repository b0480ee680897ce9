"""Signals at every moment: whatever their number, what is saved is a whole step's."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lema.engine.trainer import LemaTrainer
from lema.errors import ReadError
from lema.training.stop import StepAbandoned, StopSignals
from training_runs import StopAfter, adapter_bytes, make_model, settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
STEP = 3
"""The step that is whole; the next one is left."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """Settings, the checkpoint of a run stopped after `STEP`, and the end of one never stopped."""
    folder = tmp_path_factory.mktemp("parts")
    model, rows = make_model(folder / "model"), write_rows(folder / "rows.jsonl")
    settings = settings_of(model, rows, folder / "stopped", sample_prompts=[], num_train_epochs=1)
    train(settings, callbacks=[StopAfter(STEP)])
    train({**settings, "output_dir": str(folder / "whole")})
    return settings, folder / "stopped" / f"checkpoint-{STEP}", folder / "whole" / "final"


def same_state(one: Path, other: Path) -> None:
    """Everything numbers depend on is the same in two checkpoints."""
    assert adapter_bytes(one) == adapter_bytes(other)
    for name in ("optimizer.safetensors", "rng_state.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys(), f"{name}: {sorted(first.keys() ^ second.keys())[:3]}"
        assert all(torch.equal(first[key], second[key]) for key in first), name


class Lines:
    """Calls `at` before every line that the main thread runs in LEMA's code, from `begin` to `end`."""

    def __init__(self, at: Callable[[FrameType], None]) -> None:
        self._at = at
        self.met = 0

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if f"{Path('src', 'lema')}/" not in frame.f_code.co_filename or _in_handler(frame):
            return None
        if event == "line":
            self.met += 1
            self._at(frame)
        return self._trace

    def begin(self) -> None:
        """From here on, in what runs already too."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frame.f_trace = self._trace
            frame = frame.f_back
        sys.settrace(self._trace)

    def end(self) -> None:
        """No more."""
        sys.settrace(None)


def _in_handler(frame: FrameType | None) -> bool:
    """Whether it answers a signal: that is no line of the way out, and a tracer that raises is called no more."""
    while frame is not None:
        if frame.f_code.co_filename.endswith("stop.py"):
            return True
        frame = frame.f_back
    return False


def in_step(trainer: LemaTrainer, does: Callable[[], None]) -> None:
    """Does something in the midst of the step after the whole one, once its gradients are half there."""

    def hook(parameter: torch.Tensor) -> None:
        if trainer.global_step == STEP:
            does()

    half = len(trainer.lora_manager.get_trainable_parameters()) // 2
    trainer.lora_manager.get_trainable_parameters()[half].register_post_accumulate_grad_hook(hook)


def run_with(settings: dict[str, Any], out: Path, prepare: Callable[[LemaTrainer], None]) -> Path:
    """A run that is stopped; the checkpoint it leaves."""
    try:
        result = train({**settings, "output_dir": str(out)}, prepare=prepare)
    finally:
        sys.settrace(None)
    assert (result.status, result.global_step) == ("interrupted", STEP)
    return out / f"checkpoint-{STEP}"


def test_signals_at_every_line_of_the_way_out(parts: Any, tmp_path: Path) -> None:
    settings, stopped, whole = parts

    def at(frame: FrameType) -> None:
        if isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), StopSignals):  # not after the run
            signal.raise_signal(signal.SIGINT)

    lines = Lines(at)

    def twice_and_on() -> None:
        signal.raise_signal(signal.SIGINT)
        lines.begin()
        signal.raise_signal(signal.SIGINT)

    saved = run_with(settings, tmp_path, lambda trainer: in_step(trainer, twice_and_on))
    assert lines.met > 100, "the way out and the save after it"
    same_state(saved, stopped)
    train({**settings, "output_dir": str(tmp_path)}, resume="auto")
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole)


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 5, 8])
def test_a_third_signal_at_one_line_of_the_way_out(parts: Any, tmp_path: Path, moment: int) -> None:
    settings, stopped, _ = parts
    met = itertools.count()

    def at(frame: FrameType) -> None:
        if next(met) == moment:
            signal.raise_signal(signal.SIGTERM)

    lines = Lines(at)

    def twice_and_on() -> None:
        signal.raise_signal(signal.SIGINT)
        lines.begin()
        signal.raise_signal(signal.SIGINT)

    same_state(run_with(settings, tmp_path, lambda trainer: in_step(trainer, twice_and_on)), stopped)


@pytest.mark.parametrize("share", [i / 12 for i in range(12)])
def test_the_second_signal_at_any_line_of_a_step(parts: Any, tmp_path: Path, share: float) -> None:
    """The lines of a step are counted first, and then a signal comes before one of them."""
    settings, stopped, _ = parts
    length = _lines_of_a_step(settings, tmp_path / "counted")
    met, done = itertools.count(), []

    def at(frame: FrameType) -> None:
        number = next(met)
        if number == int(share * length):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        if number > share * length:
            signal.raise_signal(signal.SIGTERM)

    lines = Lines(at)

    class FromStep(StopAfter):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEP and not done:
                done.append(True)
                lines.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    try:
        result = train({**settings, "output_dir": str(tmp_path / "out")}, callbacks=[FromStep(0)])
    finally:
        sys.settrace(None)
    assert result.status == "interrupted" and result.global_step in (STEP, STEP + 1)
    assert not [key for key in load_file(result.adapter / "optimizer.safetensors") if key.startswith("gradient")]
    if result.global_step == STEP:
        same_state(result.adapter, stopped)
    else:
        again = {**settings, "output_dir": str(tmp_path / "again")}
        same_state(result.adapter, train(again, callbacks=[StopAfter(STEP + 1)]).adapter)


_COUNTED: dict[str, int] = {}


def _lines_of_a_step(settings: dict[str, Any], out: Path) -> int:
    if "lines" in _COUNTED:
        return _COUNTED["lines"]
    met = itertools.count()
    lines = Lines(lambda frame: next(met) and None)

    class Count(StopAfter):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEP:
                lines.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lines.end()

    train({**settings, "output_dir": str(out)}, callbacks=[Count(0)])
    _COUNTED["lines"] = next(met)
    return _COUNTED["lines"]


def test_a_signal_while_an_error_of_a_step_is_cleared_up(parts: Any, tmp_path: Path) -> None:
    settings, stopped, _ = parts

    def prepare(trainer: LemaTrainer) -> None:
        def fails() -> None:
            signal.raise_signal(signal.SIGINT)
            raise ReadError("a disk that fails")

        in_step(trainer, fails)
        abort = trainer.memory.abort

        def interrupted() -> None:
            signal.raise_signal(signal.SIGINT)
            abort()

        trainer.memory.abort = interrupted  # type: ignore[method-assign]

    same_state(run_with(settings, tmp_path, prepare), stopped)


def test_only_one_signal_leaves_what_is_under_way() -> None:
    with StopSignals() as signals, signals.abandonable(lambda: True):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StepAbandoned):
            signal.raise_signal(signal.SIGTERM)
        for number in (signal.SIGINT, signal.SIGTERM) * 3:
            signal.raise_signal(number)
    assert signals.requested == "SIGINT"


def test_the_memory_can_be_used_after_a_step_was_left(parts: Any, tmp_path: Path) -> None:
    settings, _, whole = parts
    train({**settings, "output_dir": str(tmp_path)}, prepare=lambda t: in_step(t, _two))
    train({**settings, "output_dir": str(tmp_path)}, resume="auto")
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole)


def _two() -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
