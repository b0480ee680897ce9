"""compressed-tensors: integers of 4 or 8 bits, packed along a row or one a byte, with a scale a group, row or tensor.

Format: https://github.com/vllm-project/compressed-tensors. Files, for a weight `[out, in]`: `weight_packed` int32
`[out, ceil(in * bits / 32)]`, the first code in the lowest bits, and `weight_shape` `[2]`; or `weight` int8
`[out, in]`. `weight_scale` `[out, groups]`, `[out, 1]` or one number; `weight_zero_point`, where there is one, packed
along the rows, int32 `[ceil(out * bits / 32), groups]`, or int8 beside int8; `weight_g_idx` `[in]` names groups out of
order. Codes and zero points are stored with half their range added where they are packed. A value is (code - zero) *
scale in the scales' type. (Its 8-bit floats are `fp8`'s.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ShapeMismatchError, UnsupportedError
from ..header import TensorRecord, show
from ..pieces import read_elements
from .base import Format, Run, Stored
from .integers import Grouped, bits_in_groups, check_groups, unpack
from .records import check_finite, method_of, partner, whole_run
from .tables import nibbles

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "None")
"""What a configuration may call them; each tensor says by its type what it is."""
_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class CompressedIntegers(Grouped):
    """One linear layer's weight."""

    codes: TensorRecord
    scales: TensorRecord
    zeros: TensorRecord | None
    g_idx: TensorRecord | None
    bits: int

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes, scales, and zeros and groups where there are some."""
        used = (self.codes, self.scales, self.zeros, self.g_idx)
        return tuple(whole_run(record) for record in used if record is not None)

    def part(
        self, stored: Sequence[torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor, torch.Tensor | None]:
        """See `Grouped`."""
        packed = self.codes.dtype == torch.int32
        codes = stored[0].view(self.codes.shape)[rows]
        if not packed:
            values = codes.to(torch.float32)
        elif self.bits == 4:
            values = nibbles(codes.view(torch.uint8))[:, : self.columns].contiguous()
        else:
            values = codes.view(torch.uint8)[:, : self.columns].to(torch.float32)
        scales = stored[1].view(-1, self.groups)
        scales = scales[rows] if len(scales) > 1 else scales.expand(len(values), -1)
        zeros: torch.Tensor | float = float(1 << (self.bits - 1)) if packed else 0.0
        if self.zeros is not None:
            zeros = self._zeros(stored[2].view(-1, self.groups), rows, len(values))
        return values, zeros, scales, None if self.g_idx is None else stored[-1].to(torch.int64)

    def _zeros(self, stored: torch.Tensor, rows: slice, count: int) -> torch.Tensor:
        if stored.dtype != torch.int32:
            return (stored[rows] if len(stored) > 1 else stored.expand(count, -1)).to(torch.float32)
        fit = 32 // self.bits
        return unpack(stored[rows.start // fit : -(-rows.stop // fit)], self.bits)[:count].to(torch.float32)

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales are finite, and groups that are named are there."""
        check_finite(self.scales, stored[1])
        if self.g_idx is not None:
            check_groups(self.g_idx, stored[-1], self.groups)


class CompressedTensorsFormat(Format):
    """`weight_packed`, or `weight` of bytes, with `weight_scale`."""

    name = "compressed-tensors"
    methods = frozenset({"compressed-tensors"})

    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """Every weight of a linear layer that is kept as integers."""
        if settings is not None:
            if method_of(settings) not in self.methods:
                return {}
            _check_known(settings, next(iter(records.values()), None))
        found = {}
        for name, codes in records.items():
            packed = name.endswith(".weight_packed")
            whole = name.endswith(".weight") and codes.dtype == torch.int8 and f"{name}_scale" in records
            if packed or whole:
                stored = _stored(name.removesuffix("_packed"), codes, records)
                found[stored.name] = stored
        return found

    def bits(self, settings: Mapping[str, Any]) -> float | None:
        """Of the group with the fewest, which of a mixture the experts are in."""
        parts = [group.get("weights") for group in (settings.get("config_groups") or {}).values()]
        given = [part for part in parts if isinstance(part, Mapping)]
        found = [
            bits_in_groups(part.get("num_bits"), part.get("group_size"), not part.get("symmetric")) for part in given
        ]
        return min((bits for bits in found if bits is not None), default=None)


def _check_known(settings: Mapping[str, Any], record: TensorRecord | None) -> None:
    groups = settings.get("config_groups") or {}
    kinds = {str(part.get("format")) for part in (settings, *groups.values()) if isinstance(part, Mapping)}
    if unknown := sorted(kinds - {*_FORMATS, "mixed-precision"}):
        where = record.file.parent if record is not None else "config.json"
        raise UnsupportedError(
            f"{where}: its weights are compressed-tensors' in the format {', '.join(unknown)}; LEMA decodes integers "
            f"of 4 and 8 bits and 8-bit floats ({', '.join(_FORMATS[:3])}). Take the model in one of these"
        )


def _stored(name: str, codes: TensorRecord, records: Mapping[str, TensorRecord]) -> Stored:
    scales = partner(f"{name}_scale", codes, records)
    zeros, g_idx, shape = (records.get(f"{name}_{kind}") for kind in ("zero_point", "g_idx", "shape"))
    packed = codes.name != name
    if packed and codes.dtype != torch.int32:
        raise UnsupportedError(
            f"{codes.file}: {show(codes.name)} holds codes of type {codes.dtype}; of compressed-tensors' packed "
            "weights LEMA decodes integers of 4 and 8 bits in int32"
        )
    rows, columns = _size(codes, shape, packed)
    bits = 8
    if packed:
        bits = next((bits for bits in _BITS if codes.shape[1] == -(-columns * bits // 32)), 0)
    if not bits:
        raise UnsupportedError(
            f"{codes.file}: {show(codes.name)} keeps {columns} values in {codes.shape[1]} words of 32 bits; LEMA "
            "decodes integers of 4 and 8 bits"
        )
    count = math.prod(scales.shape)
    groups = 1 if count == 1 else count // rows
    zeros_there = _zeros_of(zeros, rows, groups, bits)
    if (
        scales.shape not in ((), (1,), (1, 1), (rows,), (rows, groups))
        or not scales.dtype.is_floating_point
        or (g_idx is None and (groups == 0 or columns % groups))
        or not zeros_there
        or (g_idx is not None and (g_idx.shape != (columns,) or g_idx.dtype not in (torch.int32, torch.int64)))
    ):
        parts = ", ".join(
            f"{show(part.name)} {list(part.shape)}" for part in (codes, scales, zeros, g_idx) if part is not None
        )
        raise ShapeMismatchError(
            f"{codes.file}: {parts} do not belong together as a weight of {rows} x {columns}. Download the file again"
        )
    if g_idx is not None and bool((read_elements(g_idx, 0, columns) == -1).all()):
        g_idx_used = None  # written where there was no order to keep
    else:
        g_idx_used = g_idx
    codec = CompressedIntegers(columns, groups, scales.dtype, codes, scales, zeros, g_idx_used, bits)
    names = [f"{name}_{kind}" for kind in ("scale", "zero_point", "g_idx", "shape")]
    beside = tuple(other for other in (codes.name, *names) if other in records)
    return Stored(name, (rows, columns), scales.dtype, codec, beside)


def _size(codes: TensorRecord, shape: TensorRecord | None, packed: bool) -> tuple[int, int]:
    """Rows and columns of the weight."""
    given = [int(size) for size in read_elements(shape, 0, 2)] if shape is not None and shape.shape == (2,) else None
    if len(codes.shape) != 2 or (packed and given is None) or (given is not None and given[0] != codes.shape[0]):
        raise ShapeMismatchError(
            f"{codes.file}: {show(codes.name)} of shape {list(codes.shape)} and its size "
            f"{show(shape.name) if shape is not None else 'weight_shape'} ({given or 'not there'}) do not belong "
            "together. Download the file again"
        )
    return (given[0], given[1]) if packed and given is not None else (codes.shape[0], codes.shape[1])


def _zeros_of(zeros: TensorRecord | None, rows: int, groups: int, bits: int) -> bool:
    """Whether zero points fit, where there are some."""
    if zeros is None:
        return True
    if zeros.dtype == torch.int32:
        return zeros.shape == (-(-rows * bits // 32), groups)
    return zeros.dtype == torch.int8 and math.prod(zeros.shape) in (1, rows * groups)
