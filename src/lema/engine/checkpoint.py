"""A training state on disk: adapter, optimizer, scaler, random state, counters; safetensors and JSON only.

It knows how to write and read the state; it knows nothing of steps or when to save.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import LemaConfig
from ..errors import CheckpointError
from ..json_file import read_object
from ..storage.atomic import replaced_directory
from ..storage.complete import problem_of
from ..streaming.randomness import random_states, restore_random_states
from .base_config import check_config
from .trainables import Trainables

OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_STATE = "optimizer.json"
SCALER_STATE = "scaler.json"
TRAINER_STATE = "trainer_state.json"
RANDOM_TENSORS = "rng_state.safetensors"
RANDOM_STATE = "rng_state.json"
_FORMAT = 2


def save_checkpoint(
    directory: Path,
    config: LemaConfig,
    trainables: Trainables,
    trainer_state: Mapping[str, Any],
    engine_state: Mapping[str, Any],
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint, replacing one of the same name in one step.

    Args:
        trainables: with the gradients accumulated so far.
        trainer_state: JSON-ready; under Hugging Face's names.
        engine_state: JSON-ready counters, `scaler` and `base_weights` among them.
        more: writes further files into the directory it is given.

    Raises:
        OSError: a file could not be written; a checkpoint of the same name is as it was.
    """
    with replaced_directory(directory) as folder:
        config.save_pretrained(folder)
        tensors, state = _flatten(trainables.optimizer.state_dict())
        for name, parameter in trainables.held_by_name().items():
            if parameter.grad is not None:
                tensors[f"gradient.{name}"] = parameter.grad.detach().contiguous()
        random_tensors, random_rest = random_states(torch.device(config.device))
        try:
            trainables.owner.save_pretrained(folder)
            save_file(tensors, folder / OPTIMIZER_TENSORS)
            _write_json(folder / OPTIMIZER_STATE, state)
            _write_json(folder / SCALER_STATE, engine_state["scaler"])
            own = {"format": _FORMAT, **{k: v for k, v in engine_state.items() if k != "scaler"}}
            _write_json(folder / TRAINER_STATE, {**trainer_state, "lema": {**trainer_state.get("lema", {}), **own}})
            _write_json(folder / RANDOM_STATE, random_rest)
            save_file(random_tensors, folder / RANDOM_TENSORS)
            if more is not None:
                more(folder)
        except SafetensorError as error:
            raise OSError(f"{directory} could not be written: {error}") from error


def load_checkpoint(
    directory: Path,
    trainables: Trainables,
    base_weights: Mapping[str, Any],
    base_config: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """Put a saved state back; returns the trainer's state. The random state goes to the host's generators and those
    of `device`; the model's values are there, and not yet where else they are held.

    Everything is read and compared before anything is changed.

    Raises:
        CheckpointError: not a complete checkpoint, damaged, or of another base, adapter or optimizer.
    """
    folder = Path(directory)
    if (problem := problem_of(folder)) is not None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {problem}; use an earlier one")
    try:
        # copies: what load_file gives is the mapped file, which may go or be cut while training goes on
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / OPTIMIZER_TENSORS).items()}
        state, scaler, trainer_state, random_rest = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in (OPTIMIZER_STATE, SCALER_STATE, TRAINER_STATE, RANDOM_STATE)
        )
        random_tensors = load_file(folder / RANDOM_TENSORS)
        own = trainer_state["lema"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of this version, or damaged: {error}") from error
    if own.get("format") != _FORMAT:
        raise CheckpointError(f"{folder} has format {own.get('format')!r}; this version reads {_FORMAT}")
    check_base(folder, own["base_weights"], base_weights)
    check_config(folder, own.get("base_config", {}), base_config)
    trainables.owner.load_pretrained(folder)
    for name, parameter in trainables.held_by_name().items():
        gradient = tensors.pop(f"gradient.{name}", None)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    _restore_optimizer(folder, trainables.optimizer, tensors, state)
    restore_random_states(random_tensors, random_rest, torch.device(device))
    own["scaler"] = scaler
    return dict(trainer_state)


def check_base(folder: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """`CheckpointError` unless a checkpoint's base weights are those of now; says which files differ and how."""
    if saved == here:
        return
    differ = []
    for name in sorted({*saved, *here}):
        before, now = saved.get(name), here.get(name)
        if before is None or now is None:
            differ.append(f"{name} is there only {'now' if before is None else 'in the checkpoint'}")
        elif before != now:
            what = next(key for key in ("bytes", "header", "samples") if before.get(key) != now.get(key))
            sizes = f" ({before['bytes']} bytes then, {now['bytes']} now)" if what == "bytes" else ""
            differ.append(f"{name} has other {'contents' if what == 'samples' else what}{sizes}")
    raise CheckpointError(
        f"{folder} was trained on other base weights: {'; '.join(differ)}. Give the weights it was trained on, or "
        "start a new run in another output_dir"
    )


def check_base_of_adapter(folder: Path, here: Mapping[str, Any]) -> None:
    """As `check_base`, for an adapter to go on from, where it notes the base that it was trained on."""
    path = folder / TRAINER_STATE
    if not path.is_file():
        return
    own = read_object(path).get("lema")
    noted = own.get("base_weights") if isinstance(own, dict) else None
    if isinstance(noted, dict) and {*noted} == {*here}:
        check_base(folder, noted, here)


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


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
