"""A training state on disk: adapter, optimizer, counters, random state; safetensors and JSON only.

It knows how to write and read the state; it knows nothing of steps or when to save.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import LemaConfig
from ..core.lora import LoRAManager
from ..errors import CheckpointError
from .files import MARKER, replaced_directory

OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_STATE = "optimizer.json"
TRAINER_STATE = "trainer_state.json"
RANDOM_STATE = "rng_state.safetensors"
_FORMAT = 1


def save_checkpoint(
    directory: Path,
    config: LemaConfig,
    lora: LoRAManager,
    optimizer: torch.optim.Optimizer,
    trainer_state: Mapping[str, Any],
    holders: Mapping[str, torch.nn.Parameter],
) -> None:
    """Write a checkpoint, replacing one of the same name in one step.

    Args:
        trainer_state: JSON-ready counters of the trainer.
        holders: parameters with the gradients accumulated so far, by the adapter's names.
    """
    with replaced_directory(directory) as folder:
        config.save_pretrained(folder)
        lora.save_pretrained(folder)
        tensors, state = _flatten(optimizer.state_dict())
        for name, parameter in holders.items():
            if parameter.grad is not None:
                tensors[f"gradient.{name}"] = parameter.grad.detach().contiguous()
        save_file(tensors, folder / OPTIMIZER_TENSORS)
        _write_json(folder / OPTIMIZER_STATE, state)
        _write_json(folder / TRAINER_STATE, {"format": _FORMAT, **trainer_state, "python_random": _python_random()})
        save_file(_random_states(), folder / RANDOM_STATE)


def load_checkpoint(
    directory: Path, lora: LoRAManager, optimizer: torch.optim.Optimizer, holders: Mapping[str, torch.nn.Parameter]
) -> dict[str, Any]:
    """Put a saved state back; returns the trainer's counters. Gradients go to `holders`, see `save_checkpoint`.

    Raises:
        CheckpointError: not a complete checkpoint, damaged, or of another adapter or optimizer.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: give the directory of a checkpoint")
    if not (folder / MARKER).is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: its {MARKER} file is missing; use an earlier one"
        )
    lora.load_pretrained(folder)
    try:
        tensors = load_file(folder / OPTIMIZER_TENSORS)
        state = json.loads((folder / OPTIMIZER_STATE).read_text(encoding="utf-8"))
        trainer_state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        random_states = load_file(folder / RANDOM_STATE)
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}; use an earlier checkpoint") from error
    if trainer_state.get("format") != _FORMAT:
        raise CheckpointError(f"{folder} has format {trainer_state.get('format')!r}; this version reads {_FORMAT}")
    for name, parameter in holders.items():
        gradient = tensors.pop(f"gradient.{name}", None)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    _restore_optimizer(folder, optimizer, tensors, state)
    _restore_random(random_states, trainer_state["python_random"])
    return dict(trainer_state)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name, and the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"state.{index}.{key}"] = value.detach().clone().contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def _restore_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], saved: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        state.setdefault(int(index), {})[key] = tensor
    for index, values in saved["scalars"].items():
        state.setdefault(int(index), {}).update(values)
    groups = saved["param_groups"]
    for group in groups:  # JSON has no tuples, and betas are one
        group.update({key: tuple(value) for key, value in group.items() if key == "betas"})
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"{folder / OPTIMIZER_STATE} belongs to another optimizer: {error}") from error


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())})
    return states


def _restore_random(states: dict[str, torch.Tensor], python_random: list[Any]) -> None:
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := states.get(f"cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)
    version, internal, gauss = python_random
    random.setstate((version, tuple(internal), gauss))


def _python_random() -> list[Any]:
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
