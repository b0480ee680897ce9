"""Integers with scales and zero points for groups: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from codec_helpers import decode, find, same_bits
from lema.errors import LemaError, MissingTensorError, ShapeMismatchError, UnsupportedError, WeightsFormatError
from lema.storage.codecs import Stored
from lema.storage.codecs.awq import AwqFormat
from lema.storage.codecs.compressed_tensors import CompressedTensorsFormat
from lema.storage.codecs.gptq import GptqFormat
from lema.storage.header import read_header
from quantised_files import awq, by_the_formula, compressed, gptq, integers, packed, scales_of

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [torch.float16, torch.bfloat16, torch.float32]


# --- GPTQ -----------------------------------------------------------------------------------------


def found_on_disk(folder: Path, known: Any, tensors: dict[str, torch.Tensor], quantised: Any) -> Stored:
    """Where a format looks into contents, there has to be a file."""
    save_file(tensors, folder / "model.safetensors")
    records = {record.name: record for record in read_header(folder / "model.safetensors").records}
    (stored,) = known.find(records, quantised).values()
    return stored


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
def test_gptq_follows_its_formula(tmp_path: Path, bits: int, ordered: bool, version: str | None) -> None:
    for rows, columns, size in ((32, 16, 8), (8, 64, 64), (40, 24, 8)):
        group = torch.arange(columns) // size
        group = group if ordered else group[torch.randperm(columns)]
        quantised = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version} if version else None
        tensors, expected = gptq(bits, rows, columns, group, less=0 if version == "gptq_v2" else 1)
        stored = found_on_disk(tmp_path, GptqFormat(), tensors, quantised)
        assert stored.name == "a.weight" and stored.shape == (rows, columns) and set(stored.consumes) == set(tensors)
        for dtype in TYPES:
            assert same_bits(decode(stored, tensors, dtype), expected(dtype))
        del tensors["a.g_idx"]
        if ordered:  # older files have no order of groups
            assert same_bits(
                decode(find(GptqFormat(), tensors, quantised)["a.weight"], tensors, dtype), expected(dtype)
            )


def test_gptq_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4}
    tensors, _ = gptq(4, 16, 32, torch.arange(32) // 8)
    with pytest.raises(UnsupportedError, match="marlin"):
        find(GptqFormat(), tensors, {**quantised, "checkpoint_format": "marlin"})
    with pytest.raises(UnsupportedError, match=r"a\.qweight.*3 bits"):
        find(GptqFormat(), tensors, {**quantised, "bits": 3})
    for name in ("a.scales", "a.qzeros"):
        without = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(MissingTensorError, match=rf"a\.qweight.*{name}"):
            find(GptqFormat(), without, quantised)
        for wrong in (tensors[name][:2], tensors[name][:, :1], tensors[name].reshape(-1)):
            with pytest.raises(ShapeMismatchError, match=rf"{name}"):
                find(GptqFormat(), {**tensors, name: wrong}, quantised)
    with pytest.raises(ShapeMismatchError, match=r"a\.g_idx"):
        find(GptqFormat(), {**tensors, "a.g_idx": tensors["a.g_idx"][:5]}, quantised)
    for index in (-1, 4):
        bad = tensors["a.g_idx"].index_fill(0, torch.tensor(3), index)
        with pytest.raises(WeightsFormatError, match=rf"a\.g_idx.*group {index} for column 3"):
            found_on_disk(tmp_path, GptqFormat(), {**tensors, "a.g_idx": bad}, quantised)
    bad = tensors["a.scales"].index_fill(1, torch.tensor(2), float("nan"))
    stored = found_on_disk(tmp_path, GptqFormat(), {**tensors, "a.scales": bad}, quantised)
    with pytest.raises(WeightsFormatError, match=r"a\.scales.*nan"):
        decode(stored, {**tensors, "a.scales": bad}, torch.float32)


# --- AWQ ------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 20), st.sampled_from(TYPES))
def test_awq_follows_its_formula(words: int, groups: int, size: int, dtype: torch.dtype) -> None:
    tensors, expected = awq(8 * words, groups * size, groups)
    for quantised in ({"quant_method": "awq", "bits": 4, "version": "gemm"}, None):
        (stored,) = find(AwqFormat(), tensors, quantised).values()
        assert stored.name == "a.weight" and set(stored.consumes) == set(tensors)
        assert same_bits(decode(stored, tensors, dtype), expected(dtype))
    assert find(GptqFormat(), tensors) == {}, "without a configuration sizes tell AWQ from GPTQ"


def test_awq_that_cannot_be_is_refused_by_name() -> None:
    tensors, _ = awq(16, 32, 4)
    for settings_of in ({"version": "gemv"}, {"bits": 3}):
        with pytest.raises(UnsupportedError, match=r"AWQ.*gemm"):
            find(AwqFormat(), tensors, {"quant_method": "awq", **settings_of})
    for name in ("a.scales", "a.qzeros"):
        with pytest.raises(MissingTensorError, match=rf"a\.qweight.*{name}"):
            find(AwqFormat(), {k: v for k, v in tensors.items() if k != name}, {"quant_method": "awq"})
        with pytest.raises(ShapeMismatchError, match=rf"{name}"):
            find(AwqFormat(), {**tensors, name: tensors[name][:3]}, {"quant_method": "awq"})
    bad = {**tensors, "a.scales": tensors["a.scales"].index_fill(0, torch.tensor(1), float("inf"))}
    with pytest.raises(WeightsFormatError, match=r"a\.scales.*inf.*element 16"):
        decode(find(AwqFormat(), bad)["a.weight"], bad, torch.float32)


# --- compressed-tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "whole"), [(4, False), (8, False), (8, True)])
def test_compressed_tensors_integers_are_the_librarys(
    tmp_path: Path, bits: int, whole: bool, symmetric: bool, scale: torch.dtype
) -> None:
    for rows, columns, groups in ((40, 64, 4), (7, 24, 1), (33, 37, 1), (9, 30, 5)):
        pytest.importorskip("compressed_tensors")
        tensors, expected = compressed(bits, rows, columns, groups, symmetric, scale, whole)
        for quantised in ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, None):
            stored = found_on_disk(tmp_path, CompressedTensorsFormat(), tensors, quantised)
            assert stored.name == "a.weight" and stored.shape == (rows, columns)
            assert set(stored.consumes) == set(tensors)
            for dtype in TYPES:
                assert same_bits(decode(stored, tensors, dtype), expected.to(dtype))


def test_compressed_tensors_groups_out_of_order(tmp_path: Path) -> None:
    codes, scales = integers(4, 16, 32), scales_of(torch.bfloat16, 16, 4)
    group = (torch.arange(32) // 8)[torch.randperm(32)]
    tensors = {
        "a.weight_packed": packed(codes, 4), "a.weight_scale": scales, "a.weight_g_idx": group.to(torch.int32),
        "a.weight_shape": torch.tensor([16, 32]),
    }  # fmt: skip
    stored = found_on_disk(tmp_path, CompressedTensorsFormat(), tensors, None)
    expected = by_the_formula(codes, torch.full((16, 4), 8), scales, group, torch.float32)
    assert same_bits(decode(stored, tensors, torch.float32), expected)
    tensors["a.weight_g_idx"] = tensors["a.weight_g_idx"].index_fill(0, torch.tensor(5), 4)
    with pytest.raises(WeightsFormatError, match=r"a\.weight_g_idx.*group 4 for column 5"):
        decode(stored, tensors, torch.float32)


def test_compressed_tensors_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    def refused(kind: type[LemaError], match: str, tensors: dict[str, torch.Tensor], **quantised: Any) -> None:
        with pytest.raises(kind, match=match):
            found_on_disk(
                tmp_path, CompressedTensorsFormat(), tensors, {"quant_method": "compressed-tensors", **quantised}
            )

    codes, scales = integers(4, 16, 32), scales_of(torch.bfloat16, 16, 4)
    whole = {"a.weight_packed": packed(codes, 4), "a.weight_scale": scales, "a.weight_shape": torch.tensor([16, 32])}
    refused(UnsupportedError, "nvfp4-pack-quantized", whole, format="nvfp4-pack-quantized")
    refused(
        MissingTensorError, r"a\.weight_packed.*a\.weight_scale", {n: t for n, t in whole.items() if "scale" not in n}
    )
    refused(ShapeMismatchError, r"a\.weight_packed.*weight_shape", {n: t for n, t in whole.items() if "shape" not in n})
    refused(ShapeMismatchError, r"a\.weight_packed", {**whole, "a.weight_shape": torch.tensor([15, 32])})
    refused(UnsupportedError, r"a\.weight_packed.*4 words", {**whole, "a.weight_shape": torch.tensor([16, 40])})
    refused(ShapeMismatchError, r"a\.weight_scale", {**whole, "a.weight_scale": scales[:7]})
    refused(ShapeMismatchError, r"a\.weight_scale", {**whole, "a.weight_scale": scales[:, :3].contiguous()})
    zeros = torch.zeros(3, 4, dtype=torch.int32)
    refused(ShapeMismatchError, r"a\.weight_zero_point", {**whole, "a.weight_zero_point": zeros})
    refused(
        UnsupportedError,
        r"a\.weight_packed.*uint8",
        {**whole, "a.weight_packed": torch.zeros(16, 16, dtype=torch.uint8)},
    )
    bad = {**whole, "a.weight_scale": scales.index_fill(1, torch.tensor(1), float("nan"))}
    with pytest.raises(WeightsFormatError, match=r"a\.weight_scale.*nan"):
        decode(found_on_disk(tmp_path, CompressedTensorsFormat(), bad, None), bad, torch.float32)
