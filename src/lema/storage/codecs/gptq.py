"""GPTQ: integers of 4 or 8 bits, packed along a column's inputs, with groups that may be out of order (act-order).

Format: AutoGPTQ's and GPTQModel's `QuantLinear`, https://github.com/ModelCloud/GPTQModel. Files, for a weight
`[out, in]`: `qweight` int32 `[in * bits / 32, out]`, `qzeros` int32 `[groups, out * bits / 32]`, `scales` float16
`[groups, out]` and `g_idx` int32 `[in]`, the group of each input. Zero points are stored less one, modulo 2 ** bits;
`gptq_v2` stores them as they are. A value is (code - zero) * scale in the scales' type.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Gptq(Grouped):
    """One linear layer's weight."""

    qweight: TensorRecord
    qzeros: TensorRecord
    scales: TensorRecord
    g_idx: TensorRecord | None
    """None where the groups are runs of inputs of equal length."""
    bits: int
    stored_less: int
    """What is added to stored zero points."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes, zeros, scales, and the inputs' groups where they are out of order."""
        used = (self.qweight, self.qzeros, self.scales, self.g_idx)
        return tuple(whole_run(record) for record in used if record is not None)

    def part(
        self, stored: Sequence[torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `Grouped`."""
        fit = 32 // self.bits
        words = stored[0].view(self.qweight.shape)[:, rows].t().contiguous().view(torch.uint8)
        codes = nibbles(words) if self.bits == 4 else words.to(torch.float32)
        zeros = unpack(stored[1].view(self.qzeros.shape)[:, rows.start // fit : -(-rows.stop // fit)].t(), self.bits)
        zeros = zeros[: rows.stop - rows.start].add_(self.stored_less).bitwise_and_((1 << self.bits) - 1)
        group = None if self.g_idx is None else stored[3].to(torch.int64)
        return codes, zeros.to(torch.float32), stored[2].view(self.scales.shape)[:, rows].t(), group

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales are finite."""
        check_finite(self.scales, stored[2])


class GptqFormat(Format):
    """`qweight` with `qzeros` and `scales` as wide as itself."""

    name = "GPTQ"
    methods = frozenset({"gptq"})

    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """Every weight of a linear layer that is packed so."""
        if settings is not None and method_of(settings) not in self.methods:
            return {}
        names = [name for name in records if name.endswith(".qweight")]
        if settings is None:  # AWQ's are packed the other way
            names = [name for name in names if _as_wide(name, records)]
        return {stored.name: stored for stored in (_stored(name, records, settings or {}) for name in names)}

    def bits(self, settings: Mapping[str, Any]) -> float | None:
        """A code, and its group's share of a zero point and a float16 scale."""
        return bits_in_groups(settings.get("bits"), settings.get("group_size"), 1)


def _as_wide(name: str, records: Mapping[str, TensorRecord]) -> bool:
    scales = records.get(name.removesuffix("qweight") + "scales")
    return scales is not None and len(scales.shape) == 2 and records[name].shape[-1:] == scales.shape[-1:]


def _stored(name: str, records: Mapping[str, TensorRecord], settings: Mapping[str, Any]) -> Stored:
    stem, qweight = name.removesuffix("qweight"), records[name]
    kind = str(settings.get("checkpoint_format") or "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"{qweight.file}: its weights are GPTQ's in the format {kind!r}, which belongs to a kernel; LEMA reads "
            "'gptq' and 'gptq_v2'. Take the model in one of these"
        )
    scales, qzeros = (partner(stem + other, qweight, records) for other in ("scales", "qzeros"))
    g_idx = records.get(stem + "g_idx")
    problem = (
        f"{qweight.file}: GPTQ's {show(name)} {list(qweight.shape)}, {show(qzeros.name)} {list(qzeros.shape)} and "
    )
    problem += f"{show(scales.name)} {list(scales.shape)} do not belong together. Download the file again"
    if any(len(record.shape) != 2 for record in (qweight, scales, qzeros)) or 0 in scales.shape:
        raise ShapeMismatchError(problem)
    rows, groups = qweight.shape[1], scales.shape[0]
    bits = int(settings.get("bits") or 32 * qzeros.shape[1] // rows)
    if bits not in (4, 8):
        raise UnsupportedError(f"{qweight.file}: {show(name)} has {bits} bits; of GPTQ, LEMA decodes 4 and 8")
    columns = qweight.shape[0] * 32 // bits
    fitting = scales.shape[1] == rows and qzeros.shape == (groups, -(-rows * bits // 32)) and rows * bits % 32 == 0
    types = (qweight.dtype, qzeros.dtype) == (torch.int32, torch.int32) and scales.dtype.is_floating_point
    if not fitting or not types or (g_idx is None and columns % groups):
        raise ShapeMismatchError(problem)
    order = _out_of_order(g_idx, columns, groups) if g_idx is not None else None
    less = 0 if kind == "gptq_v2" else 1
    codec = Gptq(columns, groups, scales.dtype, qweight, qzeros, scales, order, bits, less)
    beside = (name, qzeros.name, scales.name, *([g_idx.name] if g_idx is not None else ()))
    return Stored(stem + "weight", (rows, columns), scales.dtype, codec, beside)


def _out_of_order(g_idx: TensorRecord, columns: int, groups: int) -> TensorRecord | None:
    """The record, unless its groups are runs of equal length one after the other."""
    if g_idx.shape != (columns,) or g_idx.dtype not in (torch.int32, torch.int64):
        raise ShapeMismatchError(
            f"{g_idx.file}: {show(g_idx.name)} is {g_idx.dtype} {list(g_idx.shape)}, where the group of each of "
            f"{columns} inputs is expected. Download the file again"
        )
    found = read_elements(g_idx, 0, columns)
    check_groups(g_idx, found, groups)
    even = torch.arange(columns, dtype=found.dtype).div(-(-columns // groups), rounding_mode="floor")
    return None if columns % groups == 0 and torch.equal(found, even) else g_idx
