"""A format of codes for the tests: int4, two a byte, with a scale a group; files of it, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lema.storage.codecs import Codec, Run
from lema.storage.index import GlobalBinaryIndex, TensorRecord
from lema.storage.layout import ParameterSource, whole_tensor

GROUP = 8


@dataclass(frozen=True)
class Int4(Codec):
    """`codes` uint8 `[n / 2]`, the low half first; `scales` float16 `[n / GROUP]`."""

    codes: TensorRecord
    scales: TensorRecord

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(Run(record, 0, math.prod(record.shape)) for record in (self.codes, self.scales))

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        codes, scales = stored
        values = torch.stack([codes & 15, codes >> 4], -1).view(-1, GROUP).to(out.dtype) - 8
        torch.mul(values, scales.to(out.dtype)[:, None], out=out.view(-1, GROUP))


def write(folder: Path, shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    """A file of codes, scales and norms for each shape; what the codes stand for, in float32."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected = []
    for number, shape in enumerate(shapes):
        count = math.prod(shape)
        codes = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, generator=draw)
        scales = torch.rand(count // GROUP, generator=draw).half()
        tensors |= {f"{number}.codes": codes, f"{number}.scales": scales}
        tensors[f"{number}.norm"] = torch.randn(shape[1], generator=draw)
        nibbles = torch.stack([codes % 16, codes // 16], 1).reshape(-1).float() - 8
        expected.append((nibbles * scales.float().repeat_interleave(GROUP)).view(shape))
    save_file(tensors, folder / "model.safetensors")
    return expected


def sources_of(
    gbi: GlobalBinaryIndex, number: int, shape: tuple[int, int], dtype: torch.dtype
) -> list[ParameterSource]:
    codec = Int4(gbi.record(f"{number}.codes"), gbi.record(f"{number}.scales"))
    return [
        ParameterSource(f"{number}.weight", shape, dtype, codec),
        whole_tensor(f"{number}.norm", gbi.record(f"{number}.norm")),
    ]
