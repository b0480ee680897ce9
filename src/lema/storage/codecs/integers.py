"""Weights as integers of 4 or 8 bits, a scale and a zero point for a group of columns of each row: what the formats of
GPTQ, AWQ and compressed-tensors have in common once their integers are unpacked.

It knows rows, groups and arithmetic; how integers lie in a file, the formats know.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import WeightsFormatError
from ..header import TensorRecord, show
from .base import Codec
from .tables import chunks

_STEP = 32
"""Rows of a chunk are a multiple of it, so that no packed word is cut."""


@dataclass(frozen=True, slots=True)
class Grouped(Codec):
    """A matrix `[rows, columns]`: value = (code - zero) * scale, rounded to the scales' type before the parameter's."""

    columns: int
    groups: int
    scale_type: torch.dtype

    @abstractmethod
    def part(
        self, stored: Sequence[torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor, torch.Tensor | None]:
        """What makes these rows: codes float32 `[n, columns]` that may be written, zeros `[n, groups]` or one for all,
        scales `[n, groups]`, and each column's group `[columns]`, or None where groups are runs of equal length."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`out` is `[rows, columns]`."""
        for rows in chunks(out.shape[0], out.shape[1], _STEP):
            values, zeros, scales, group = self.part(stored, rows)
            scales = scales.to(torch.float32)
            if group is not None:
                values.sub_(zeros if isinstance(zeros, float) else zeros.index_select(1, group))
                values.mul_(scales.index_select(1, group))
            else:
                grouped = values.view(len(values), self.groups, -1)
                grouped.sub_(zeros if isinstance(zeros, float) else zeros.unsqueeze(-1))
                grouped.mul_(scales.unsqueeze(-1))
            out[rows].copy_(values if self.scale_type == out.dtype else values.to(self.scale_type))


def unpack(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Integers packed into words along the first dimension, the first in the lowest bits: int32 `[n, m]` ->
    int32 `[n * 32 / bits, m]`.

    Args:
        order: which of a word's integers comes first, second, ...; None: as they lie.
    """
    places = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device).mul_(bits)
    found = words.contiguous().unsqueeze(1).bitwise_right_shift(places.view(1, -1, 1)).bitwise_and_((1 << bits) - 1)
    return found.reshape(-1, words.shape[1])


def check_groups(record: TensorRecord, named: torch.Tensor, groups: int) -> None:
    """Refuse a column whose group is not there.

    Raises:
        WeightsFormatError: names the tensor, the column and the group.
    """
    wrong = (named < 0) | (named >= groups)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise WeightsFormatError(
            f"{record.file}: {show(record.name)} names group {int(named[first])} for column {first}, of {groups} "
            "groups. Download the file again"
        )


def bits_in_groups(bits: object, group_size: object, zeros: bool | int) -> float | None:
    """Bits a value takes: its code, and its group's share of a 16-bit scale and, where there are some, a zero point."""
    if not isinstance(bits, int):
        return None
    if not isinstance(group_size, int) or group_size < 1:  # a scale a row or a tensor
        return float(bits)
    return bits + (16 + (bits if zeros else 0)) / group_size
