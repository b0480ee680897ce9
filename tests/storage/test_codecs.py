"""A parameter of several stored tensors that are not its elements: read, moved and decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from int4 import sources_of, write
from lema.errors import UnsupportedError
from lema.models.quantised import refuse_codes
from lema.storage.codecs import Stored
from lema.storage.index import GlobalBinaryIndex
from lema.storage.layout import ALIGNMENT, ParameterSource, SlotLayout
from lema.storage.placement import PlacedTensor, chunk, concatenate, stack
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


def test_tensors_of_codes_and_plain_ones_are_put_together_in_one_parameter(tmp_path: Path) -> None:
    """Experts: two of codes and one left in float32, gate and up rows one after the other; decoded in place."""
    shape = (8, 16)
    expected = write(tmp_path, [shape] * 4)
    expected += [torch.randn(shape) for _ in range(2)]
    save_file({f"plain{number}": tensor for number, tensor in enumerate(expected[4:])}, tmp_path / "other.safetensors")
    file, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    with GlobalBinaryIndex(file) as gbi, GlobalBinaryIndex(other) as others:
        codecs = [sources_of(gbi, number, shape, torch.float32)[0].codec for number in range(4)]
        coded = [Stored(f"{n}", shape, torch.float32, codec, ()) for n, codec in enumerate(codecs)]
        whole = [PlacedTensor.whole(tensor) for tensor in (*coded, *map(others.record, others.keys))]
        fused = concatenate([stack(whole[::2], 0), stack(whole[1::2], 0)], 1)
        source = ParameterSource("experts", fused.shape, torch.float32, fused.codec)
        assert source.shape == (3, 16, 16) and not source.plain and source.pieces == ()
        layout = SlotLayout([source])
        assert layout.read_bytes == sum(record.nbytes for record in {run.record for run in source.codec.runs})
        records = [run.record for run in source.codec.runs]
        stored = [(others if record.name in others else gbi).view(record.name).reshape(-1) for record in records]
        out = torch.full(source.shape, torch.nan)
        source.codec.check(stored)
        source.codec.decode(stored, out)
        assert torch.equal(out, torch.cat([torch.stack(expected[::2]), torch.stack(expected[1::2])], 1))
        with pytest.raises(UnsupportedError, match=r"0: is kept as codes, and the model wants 64 of its 128 values"):
            _ = chunk(whole[0], 2, 0)[0].codec
