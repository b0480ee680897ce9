"""What formats ask of a checkpoint's records and of stored values: partners by name, whole tensors, finite scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import MissingTensorError, WeightsFormatError
from ..header import TensorRecord, show
from .base import Run


def method_of(settings: Mapping[str, Any] | None) -> str | None:
    """What `quant_method` says in a configuration's `quantization_config`."""
    method = None if settings is None else settings.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def whole_run(record: TensorRecord) -> Run:
    """A stored tensor from the first element to the last."""
    return Run(record, 0, math.prod(record.shape))


def partner(name: str, codes: TensorRecord, records: Mapping[str, TensorRecord]) -> TensorRecord:
    """The tensor without which these codes cannot be decoded.

    Raises:
        MissingTensorError: it is not there.
    """
    if name not in records:
        raise MissingTensorError(
            f"{codes.file}: {show(codes.name)} holds codes, and {show(name)}, without which they cannot be decoded, is "
            "missing. Check that every shard is there"
        )
    return records[name]


def check_finite(record: TensorRecord, values: torch.Tensor) -> None:
    """Refuse scales that are NaN or infinite.

    Raises:
        WeightsFormatError: names the tensor and the element.
    """
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise WeightsFormatError(
            f"{record.file}: tensor {show(record.name)} has the scale {float(values[first])} at element {first}; with "
            "it weights are no numbers. Download the file again"
        )
