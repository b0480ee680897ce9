"""AWQ: integers of 4 bits, packed along a row's outputs eight to a word in an order of their own.

Format: AutoAWQ's `WQLinear_GEMM`, https://github.com/casper-hansen/AutoAWQ. Files, for a weight `[out, in]`: `qweight`
int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]`, `scales` float16 `[groups, out]`. From the lowest half-byte
of a word to the highest lie its outputs 0, 2, 4, 6, 1, 3, 5, 7. A value is (code - zero) * scale in the scales' type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ShapeMismatchError, UnsupportedError
from ..header import TensorRecord, show
from .base import Format, Run, Stored
from .integers import Grouped, bits_in_groups, unpack
from .records import check_finite, method_of, partner, whole_run

_BITS, _FIT = 4, 8
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word an output's code lies, in half-bytes from the lowest."""


@dataclass(frozen=True, slots=True)
class Awq(Grouped):
    """One linear layer's weight."""

    qweight: TensorRecord
    qzeros: TensorRecord
    scales: TensorRecord

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes, zeros, scales."""
        return tuple(whole_run(record) for record in (self.qweight, self.qzeros, self.scales))

    def part(
        self, stored: Sequence[torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """See `Grouped`."""
        words = slice(rows.start // _FIT, rows.stop // _FIT)
        codes, zeros = (
            unpack(packed.view(record.shape)[:, words].t(), _BITS, _ORDER).to(torch.float32)
            for packed, record in zip(stored, (self.qweight, self.qzeros), strict=False)
        )
        return codes, zeros, stored[2].view(self.scales.shape)[:, rows].t(), None

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales are finite."""
        check_finite(self.scales, stored[2])


class AwqFormat(Format):
    """`qweight` with `qzeros`, and `scales` eight times as wide."""

    name = "AWQ"
    methods = frozenset({"awq"})

    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """Every weight of a linear layer that is packed so."""
        if settings is not None and method_of(settings) not in self.methods:
            return {}
        names = [name for name in records if name.endswith(".qweight")]
        if settings is None:  # GPTQ's are packed the other way
            names = [name for name in names if _eight_times_as_wide(name, records)]
        return {stored.name: stored for stored in (_stored(name, records, settings or {}) for name in names)}

    def bits(self, settings: Mapping[str, Any]) -> float | None:
        """A code, and its group's share of a zero point and a float16 scale."""
        return bits_in_groups(settings.get("bits"), settings.get("group_size"), 1)


def _eight_times_as_wide(name: str, records: Mapping[str, TensorRecord]) -> bool:
    scales, shape = records.get(name.removesuffix("qweight") + "scales"), records[name].shape
    return scales is not None and len(scales.shape) == len(shape) == 2 and scales.shape[1] == _FIT * shape[1]


def _stored(name: str, records: Mapping[str, TensorRecord], settings: Mapping[str, Any]) -> Stored:
    stem, qweight = name.removesuffix("qweight"), records[name]
    kind = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = int(settings.get("bits") or settings.get("w_bit") or _BITS)
    if kind != "gemm" or bits != _BITS:
        raise UnsupportedError(
            f"{qweight.file}: its weights are AWQ's of {bits} bits in the layout {kind!r}; LEMA reads 4 bits in "
            "'gemm'. Take the model in that"
        )
    scales, qzeros = (partner(stem + other, qweight, records) for other in ("scales", "qzeros"))
    groups, rows = scales.shape if len(scales.shape) == 2 else (0, 0)
    columns = qweight.shape[0] if qweight.shape else 0
    words = (qweight.shape, qzeros.shape) == ((columns, rows // _FIT), (groups, rows // _FIT)) and rows % _FIT == 0
    types = (qweight.dtype, qzeros.dtype) == (torch.int32, torch.int32) and scales.dtype.is_floating_point
    if not groups or columns % groups or not words or not types:
        raise ShapeMismatchError(
            f"{qweight.file}: AWQ's {show(name)} {list(qweight.shape)}, {show(qzeros.name)} {list(qzeros.shape)} and "
            f"{show(scales.name)} {list(scales.shape)} do not belong together. Download the file again"
        )
    codec = Awq(columns, groups, scales.dtype, qweight, qzeros, scales)
    return Stored(stem + "weight", (rows, columns), scales.dtype, codec, (name, qzeros.name, scales.name))
