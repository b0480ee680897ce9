"""Stored tensors without files, and codecs run on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lema.storage.codecs import Format, Stored
from lema.storage.header import TensorRecord


def record(name: str, tensor: torch.Tensor) -> TensorRecord:
    """A record of a tensor that is in no file."""
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    return TensorRecord(name, Path("model.safetensors"), 0, size, tensor.dtype, tuple(tensor.shape))


def find(
    known: Format, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None
) -> dict[str, Stored]:
    """What a format finds among these tensors."""
    return known.find({name: record(name, tensor) for name, tensor in tensors.items()}, settings)


def decode(
    stored: Stored, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, checked: bool = True
) -> torch.Tensor:
    """The values of what a format found."""
    values = [tensors[run.record.name].reshape(-1)[run.source : run.source + run.count] for run in stored.codec.runs]
    if checked:
        stored.codec.check(values)
    out = torch.full(stored.shape, float("nan"), dtype=dtype)
    stored.codec.decode(values, out)
    return out


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit; zeros of either sign differ, and one NaN is as good as another."""
    assert first.dtype == second.dtype and first.shape == second.shape
    integer = {2: torch.int16, 4: torch.int32}[first.dtype.itemsize]
    equal = first.contiguous().view(integer) == second.contiguous().view(integer)
    return bool((equal | (first.isnan() & second.isnan())).all())
