"""A parameter of several stored tensors that are not its elements: read, moved and decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from int4 import sources_of, write
from lema.models.quantised import refuse_codes
from lema.storage.index import GlobalBinaryIndex
from lema.storage.layout import ALIGNMENT, SlotLayout
from lema.storage.reader import DiskReader, ReadJob
from lema.storage.views import Decoder, mapped_or_materialized, materialize, page_aligned, typed_view


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
