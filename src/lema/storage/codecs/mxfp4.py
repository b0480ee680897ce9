"""MXFP4: blocks of 32 numbers of four bits (E2M1) with a scale of eight (E8M0), as OpenAI's gpt-oss files have experts.

Format: OCP Microscaling Formats (MX) specification 1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
Files: `NAME_blocks` uint8 `[experts, out, in / 32, 16]`, two codes a byte, the low half first, and `NAME_scales` uint8
`[experts, out, in / 32]`, the exponent plus 127. The parameter is their transposition, `[experts, in, out]`. Values are
those of transformers' `convert_moe_packed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...errors import ShapeMismatchError, WeightsFormatError
from ..header import TensorRecord, show
from .base import Codec, Format, Run, Stored
from .records import method_of, partner, whole_run
from .tables import chunks, look_up_pairs, pairs

_BLOCK = 32
_NAN = 255
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4(Codec):
    """Experts of one projection."""

    blocks: TensorRecord
    scales: TensorRecord

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes, then scales."""
        return whole_run(self.blocks), whole_run(self.scales)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`out` is `[experts, in, out]`."""
        experts, inner, rows = out.shape
        blocks = stored[0].view(experts, rows, inner // _BLOCK, _BLOCK // 2)
        scales = stored[1].view(experts, rows, inner // _BLOCK)
        table = _table(out.dtype, out.device)
        for expert in range(experts):
            for part in chunks(rows, inner):
                index = blocks[expert, part].to(torch.int32)
                index.add_(scales[expert, part].to(torch.int32).mul_(256).unsqueeze(-1))
                values = look_up_pairs(table, index, out.dtype).view(-1, inner)
                out[expert, :, part].copy_(values.t())

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """No scale is the format's NaN."""
        if bool((stored[1] == _NAN).any()):
            first = int((stored[1] == _NAN).nonzero()[0])
            raise WeightsFormatError(
                f"{self.scales.file}: tensor {show(self.scales.name)} has the scale 255, which is NaN, at element "
                f"{first}. Download the file again"
            )


@lru_cache(maxsize=4)
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values of each byte under each scale, at `256 * scale + byte`."""
    exponent = torch.arange(256, dtype=torch.int32).sub_(127).unsqueeze(-1)
    values = torch.tensor(_VALUES, dtype=torch.float32).mul(torch.pow(2.0, exponent)).to(dtype)
    byte = torch.arange(256)
    return pairs(values[:, byte & 15], values[:, byte >> 4]).to(device)


class Mxfp4Format(Format):
    """Experts as blocks and scales."""

    name = "MXFP4"
    methods = frozenset({"mxfp4"})
    experts_only = True

    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """Every `NAME_blocks` of bytes with `NAME_scales`."""
        if settings is not None and method_of(settings) not in self.methods:
            return {}
        found = {}
        for name, blocks in records.items():
            stem = name.removesuffix("_blocks")
            if stem == name or blocks.dtype != torch.uint8:
                continue
            scales = partner(stem + "_scales", blocks, records)
            found[stem] = Stored(
                stem, _shape(blocks, scales), torch.bfloat16, Mxfp4(blocks, scales), (name, scales.name)
            )
        return found

    def bits(self, settings: Mapping[str, Any]) -> float | None:
        """Of experts, which nearly all values of such a model belong to."""
        return 4 + 8 / _BLOCK


def _shape(blocks: TensorRecord, scales: TensorRecord) -> tuple[int, ...]:
    shape = blocks.shape
    if len(shape) != 4 or shape[-1] != _BLOCK // 2 or scales.dtype != torch.uint8 or scales.shape != shape[:-1]:
        raise ShapeMismatchError(
            f"{blocks.file}: MXFP4 codes {show(blocks.name)} of shape {list(shape)} and scales {show(scales.name)} of "
            f"shape {list(scales.shape)} ({scales.dtype}) do not belong together: expected [experts, rows, blocks, 16] "
            "and uint8 [experts, rows, blocks]. Download the file again"
        )
    return shape[0], shape[2] * _BLOCK, shape[1]
