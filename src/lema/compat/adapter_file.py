"""Adapters that the original LEMA saved: `adapter_model.bin`, a dict of tensors.

Its keys are `<layer id>.<module path in the layer>.lora_A` (and `lora_B`), layer ids counted from the embedding = 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch

from ..errors import CheckpointError


def load_original(file: str | os.PathLike[str], own: Mapping[str, torch.Tensor], layers: str) -> None:
    """Copy such an adapter's weights into an adapter's own; the file is read without executing anything in it.

    Args:
        own: the adapter's parameters by PEFT's names.
        layers: path of the decoder layers, with which these names begin.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is not such a dict, or its tensors are not exactly this adapter's.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the adapter_model.bin of an original checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a dict of tensors: {error}") from error
    by_key = {_key_of(name, layers): parameter for name, parameter in own.items()}
    values: dict[str, object] = saved if isinstance(saved, dict) else {}
    problems = [key for key in by_key if key not in values] + [key for key in values if key not in by_key]
    matched: dict[str, torch.Tensor] = {}
    for key in by_key if not problems else ():
        value = _oriented(values[key], by_key[key])
        if value is None:
            problems.append(f"{key} (here {tuple(by_key[key].shape)})")
        else:
            matched[key] = value
    if problems:
        raise CheckpointError(
            f"{path} does not fit this adapter: {len(problems)} tensors differ, first {problems[0]}; use the rank "
            "and the target modules it was trained with"
        )
    with torch.no_grad():
        for key, value in matched.items():
            by_key[key].copy_(value)


def _key_of(name: str, layers: str) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` -> `1.self_attn.q_proj.lora_A`."""
    if not name.startswith(f"{layers}."):
        return name
    number, _, rest = name.removeprefix(f"{layers}.").partition(".")
    return f"{int(number) + 1}.{rest.rsplit('.', 2)[0]}"


def _oriented(saved: object, own: torch.Tensor) -> torch.Tensor | None:
    """A saved tensor in the shape that is wanted here, if need be transposed."""
    if not isinstance(saved, torch.Tensor):
        return None
    if saved.shape == own.shape:
        return saved
    return saved.T if saved.T.shape == own.shape else None
