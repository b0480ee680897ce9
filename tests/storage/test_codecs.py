"""A parameter of several stored tensors that are not its elements: int4 codes, two a byte, with a scale a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lema.models.quantised import refuse_codes
from lema.storage.codecs import Codec, Run
from lema.storage.index import GlobalBinaryIndex, TensorRecord
from lema.storage.layout import ALIGNMENT, ParameterSource, SlotLayout, whole_tensor
from lema.storage.reader import DiskReader, ReadJob
from lema.storage.views import Decoder, mapped_or_materialized, materialize, page_aligned, typed_view

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True])
def test_codes_and_scales_become_a_weight(tmp_path: Path, dtype: torch.dtype, moved: bool) -> None:
    shape = (24, 16)
    (expected,) = write(tmp_path, [shape])
    with GlobalBinaryIndex(tmp_path) as gbi:
        sources = sources_of(gbi, 0, shape, dtype)
        layout = SlotLayout(sources, moved=moved)
        stored = sum(record.nbytes for record in map(gbi.record, gbi.keys))
        assert layout.read_bytes == stored, "codes are read, not values"
        assert [view.source.name for view in layout.direct] == ["0.norm"]
        slot, scratch = page_aligned(layout.nbytes), page_aligned(layout.scratch_nbytes)
        reader = DiskReader(1)
        ended: list[BaseException | None] = []
        reader.submit(ReadJob(layout.extents, memoryview(slot.numpy()), lambda: False, ended.append))  # type: ignore[arg-type]
        reader.stop()
        assert ended == [None]
        if moved:
            read, slot = slot, torch.zeros_like(slot)
            for move in layout.moves:
                assert move.target % ALIGNMENT == 0
                slot[move.target : move.target + move.nbytes] = read[move.source : move.source + move.nbytes]
        decode = Decoder(slot, scratch, layout.decoded)
        weight = typed_view(scratch, layout.decoded[0].offset, dtype, shape)
        decode()
        assert torch.equal(weight, materialize(gbi, sources[0]))
        assert torch.equal(weight, mapped_or_materialized(gbi, sources[0]))
        if dtype is torch.float32:
            assert torch.equal(weight, expected)


def test_a_codec_is_no_plain_tensor_and_is_not_taken_for_codes_without_one(tmp_path: Path) -> None:
    write(tmp_path, [(8, 8)])
    with GlobalBinaryIndex(tmp_path) as gbi:
        weight, norm = sources_of(gbi, 0, (8, 8), torch.float32)
        assert not weight.plain and norm.plain
        assert weight.pieces == ()
        assert weight == sources_of(gbi, 0, (8, 8), torch.float32)[0]
        refuse_codes([weight, norm], tmp_path)
