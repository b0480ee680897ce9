"""Whatever a loop or a step decides from what one process sees goes through the coordinator."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import TrainerCallback

from lema import LemaTrainer
from lema.coordinator import Coordinator
from lema.errors import NonFiniteError
from training_runs import adapter_bytes, settings_of, train

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
T = TypeVar("T")


class Recording(Coordinator):
    """Answers as one process, and keeps what was asked; `wishes` are those of another rank."""

    def __init__(self, **wishes: Any) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.wishes = wishes

    def totals(self, what: str, numbers: Sequence[Any]) -> list[Any]:
        self.asked.append((what, list(numbers)))
        return list(numbers)

    def add(self, what: str, tensors: Sequence[Any]) -> None:
        assert tensors and all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        self.asked.append((what, len(tensors)))

    def agree(self, what: str, wish: T) -> T:
        self.asked.append((what, wish))
        return wish or self.wishes.get(what, wish)

    def broadcast(self, what: str, value: T) -> T:
        self.asked.append((what, value))
        return value

    def meet(self, what: str) -> None:
        self.asked.append((what, None))

    def abandon(self, what: str) -> None:
        self.asked.append(("abandon", what))

    def answers(self, what: str) -> list[Any]:
        """What was asked with under a name."""
        return [value for name, value in self.asked if name == what]


def recorded(settings: dict[str, Any], **wishes: Any) -> tuple[Recording, Any]:
    """A run with a recording coordinator."""
    coordinator = Recording(**wishes)

    def prepare(trainer: LemaTrainer) -> None:
        trainer.coordinator = coordinator

    return coordinator, train(settings, prepare=prepare, callbacks=settings.pop("callbacks", ()))


def test_every_decision_of_a_run_is_asked_for(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path / "asked", max_steps=3, save_steps=2, max_train_hours=1.0)
    asked, result = recorded(settings)
    assert result.status == "finished"
    targets, losses, norms = (asked.answers(name) for name in ("targets", "loss", "norm"))
    assert len(targets) == len(losses) == len(norms) == 3 and all(count > 0 for (count,) in targets)
    assert [counts[:1] for counts in asked.answers("batch")] == targets
    assert len(set(asked.answers("gradients"))) == 1 and len(asked.answers("gradients")) == 3
    assert asked.answers("save") == [False, True, False] and asked.answers("saved") == [None, None]
    assert asked.answers("end of a block") and True in asked.answers("evaluate") and True in asked.answers("log")
    assert set(asked.answers("stop")) == {None} and set(asked.answers("out of time")) == {False}
    assert set(asked.answers("training_stop")) == {False}
    evaluated, right = asked.answers("evaluated targets")[0]
    assert evaluated >= right >= 0 and asked.answers("evaluation loss")[0][0] > 0
    train({**settings, "output_dir": str(tmp_path / "alone")})
    assert adapter_bytes(tmp_path / "asked" / "final") == adapter_bytes(tmp_path / "alone" / "final")


@pytest.mark.parametrize(("wish", "status"), [("stop", "interrupted"), ("out of time", "stopped")])
def test_what_another_rank_wants_is_done(model: Path, rows: Path, tmp_path: Path, wish: str, status: str) -> None:
    settings = settings_of(model, rows, tmp_path, max_steps=3, eval_size=0, sample_prompts=[], max_train_hours=1.0)
    _, result = recorded(settings, **{wish: "SIGTERM" if wish == "stop" else True})
    assert (result.status, result.global_step) == (status, 0)


def test_a_step_that_is_left_is_told(model: Path, rows: Path, tmp_path: Path) -> None:
    coordinator = Recording()

    def prepare(trainer: LemaTrainer) -> None:
        trainer.coordinator = coordinator

        def twice(_: torch.Tensor) -> None:
            if trainer.global_step == 1:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        trainer.lora_manager.get_trainable_parameters()[0].register_post_accumulate_grad_hook(twice)

    result = train(settings_of(model, rows, tmp_path, sample_prompts=[]), prepare=prepare)
    assert (result.status, result.global_step) == ("interrupted", 1)
    assert coordinator.answers("abandon") == ["step"] and coordinator.answers("stop")[-1] == "SIGINT"


def test_a_loss_that_is_not_finite_elsewhere_is_skipped_here(model: Path, rows: Path, tmp_path: Path) -> None:
    class Elsewhere(Recording):
        def totals(self, what: str, numbers: Sequence[Any]) -> list[Any]:
            return [float("nan")] if what == "loss" else super().totals(what, numbers)

    coordinator = Elsewhere()

    def prepare(trainer: LemaTrainer) -> None:
        trainer.coordinator = coordinator

    settings = settings_of(model, rows, tmp_path, sample_prompts=[], eval_size=0, max_nonfinite_steps=2)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        train(settings, prepare=prepare)
    assert not coordinator.answers("norm"), "nothing was stepped"


def test_a_callback_of_one_rank_saves_on_all(model: Path, rows: Path, tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 1

    settings = settings_of(model, rows, tmp_path, max_steps=2, sample_prompts=[], eval_size=0)
    asked, _ = recorded({**settings, "callbacks": [Asks()]})
    assert asked.answers("save") == [True, False] and asked.answers("saved") == [None, None]
