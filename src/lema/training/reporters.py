"""TensorBoard, Weights & Biases and trackio, where they are installed and asked for.

It knows their names and how a number is told them; it knows nothing of training.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..libraries import how_to_install
from .callbacks import TrainerCallback

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Reporter(TrainerCallback, ABC):
    """A callback that tells a tracker, and that must be ended whatever becomes of the run."""

    _ended = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the tracker that the run came to its end."""
        self.end(failed=False)

    def end(self, failed: bool) -> None:
        """Tell the tracker that there is nothing more to come, once."""
        if not self._ended:
            self._ended = True
            self._close(failed)

    @abstractmethod
    def _close(self, failed: bool) -> None:
        """Tell the tracker itself."""


@contextlib.contextmanager
def reporting(names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any]) -> Iterator[list[Any]]:
    """A callback for each name; each is ended when the block is left, as failed if that is by an error.

    Raises:
        ConfigError: a package is not installed; says how to get it.
    """
    with contextlib.ExitStack() as open_ones:
        made = []
        for name in names:
            reporter = _reporter(name, folder, run_name, settings)
            open_ones.push(lambda kind, *_, ended=reporter: ended.end(failed=kind is not None))
            made.append(reporter)
        yield made


def check_reporters(names: Sequence[str]) -> None:
    """`ConfigError` where a package of one of these is not installed; says how to get it."""
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"report_to={name} needs a package that is not installed ({error}): {how_to_install(name)}, or set "
            "report_to to none; metrics.jsonl is written in any case"
        ) from error


def _reporter(name: str, folder: Path, run_name: str, settings: Mapping[str, Any]) -> Reporter:
    module = _module(name)
    if name == "tensorboard":
        return TensorBoard(module.SummaryWriter(str(folder / "runs" / run_name)))
    kind = Wandb if name == "wandb" else Trackio
    return kind(module, folder, run_name, settings)


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in logs.items()
        if isinstance(value, (int, float)) and name != "step"
    }


class TensorBoard(Reporter):
    """Writes event files."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell numbers."""
        for name, value in _numbers(kwargs["logs"]).items():
            self._writer.add_scalar(name, value, state.global_step)

    def _close(self, failed: bool) -> None:
        self._writer.close()


class Trackio(Reporter):
    """trackio, which has wandb's interface."""

    def __init__(self, module: Any, folder: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="lema", name=run_name, config=dict(settings), **self._options(folder))

    def _options(self, folder: Path) -> dict[str, Any]:
        return {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell numbers."""
        self._module.log(_numbers(kwargs["logs"]), step=state.global_step)

    def _close(self, failed: bool) -> None:
        self._module.finish()


class Wandb(Trackio):
    """Weights & Biases; its files go into the run's folder unless WANDB_DIR says otherwise."""

    def _options(self, folder: Path) -> dict[str, Any]:
        return {"dir": os.environ.get("WANDB_DIR", str(folder))}

    def _close(self, failed: bool) -> None:
        self._module.finish(exit_code=int(failed))
