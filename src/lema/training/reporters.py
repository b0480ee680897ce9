"""TensorBoard, Weights & Biases and trackio, where they are installed and asked for.

It knows their names and how a number is told them; it knows nothing of training.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .callbacks import TrainerCallback

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def make_reporters(names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any]) -> list[Any]:
    """A callback for each name.

    Raises:
        ConfigError: a package is not installed; says how to get it.
    """
    return [_reporter(name, folder, run_name, settings) for name in names]


def _reporter(name: str, folder: Path, run_name: str, settings: Mapping[str, Any]) -> TrainerCallback:
    try:
        module = importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"report_to={name} needs a package that is not installed ({error}): pip install {name}, or set report_to "
            "to none; metrics.jsonl is written in any case"
        ) from error
    if name == "tensorboard":
        return _TensorBoard(module.SummaryWriter(str(folder / "runs" / run_name)))
    return _Tracker(module, run_name, settings)


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in logs.items()
        if isinstance(value, (int, float)) and name != "step"
    }


class _TensorBoard(TrainerCallback):
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in _numbers(kwargs["logs"]).items():
            self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._writer.close()


class _Tracker(TrainerCallback):
    """wandb, and trackio, which has its interface."""

    def __init__(self, module: Any, run_name: str, settings: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="lema", name=run_name, config=dict(settings))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._module.log(_numbers(kwargs["logs"]), step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._module.finish()
