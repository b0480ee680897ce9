"""FP8 weights with scales by block, row and tensor, beside transformers' own decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from codec_helpers import decode, find, same_bits
from lema.errors import MissingTensorError, ShapeMismatchError, UnsupportedError, WeightsFormatError
from lema.storage.codecs.fp8 import Fp8Format

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NAMES = ("a.weight", "a.weight_scale_inv")


def codes_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any codes but NaN."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return codes.masked_fill_(codes & 127 == 127, 0).view(torch.float8_e4m3fn)


def scales_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape) * 3).exp2().mul(0.01).to(dtype)


def both(weight: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, (weight, scales), strict=True))


def theirs(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=dtype)
    return made


def ours(tensors: dict[str, torch.Tensor], dtype: torch.dtype, quantised: dict[str, Any] | None) -> torch.Tensor:
    (stored,) = find(Fp8Format(), tensors, quantised).values()
    assert stored.name == "a.weight" and stored.shape == tensors["a.weight"].shape
    return decode(stored, tensors, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_is_torchs_value(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    for scale in (1.0, 1e-30, 3e38, 0.0):
        tensors = both(codes, torch.tensor(scale))
        (stored,) = find(Fp8Format(), tensors, SETTINGS).values()
        made = decode(stored, tensors, dtype, checked=False)
        assert same_bits(made, theirs(codes, torch.tensor(scale), dtype))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)),
    st.sampled_from([(128, 128), (4, 6), (1, 7), (5, 3)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(TYPES),
    st.integers(0, 2**31),
)
def test_whole_blocks_are_transformers_values(
    grid: tuple[int, int, int], block: tuple[int, int], scale_type: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    batch = (grid[2],) if grid[2] else ()
    weight = codes_of((*batch, grid[0] * block[0], grid[1] * block[1]), seed)
    scales = scales_of((*batch, *grid[:2]), scale_type)
    made = ours(both(weight, scales), dtype, {"quant_method": "fp8", "weight_block_size": list(block)})
    assert same_bits(made, theirs(weight, scales, dtype))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(TYPES))
def test_a_last_partial_block_has_the_scale_of_its_place(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, scales = codes_of((rows, columns)), scales_of((-(-rows // 128), -(-columns // 128)))
    each = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    expected = (weight.to(torch.float32) * each).to(dtype)
    assert same_bits(ours(both(weight, scales), dtype, SETTINGS), expected)
    assert same_bits(ours(both(weight, scales), dtype, None), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(37, 1), (37,)])
def test_a_scale_a_row(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, scales = codes_of((37, 21)), scales_of(shape)
    expected = theirs(weight, scales.view(37, 1), dtype)
    assert same_bits(
        ours({"a.weight": weight, "a.weight_scale": scales}, dtype, {"quant_method": "fbgemm_fp8"}), expected
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_a_tensor(shape: tuple[int, ...]) -> None:
    weight, scales = codes_of((37, 21)), scales_of(shape)
    tensors = {**both(weight, scales), "a.activation_scale": torch.ones(())}
    (stored,) = find(Fp8Format(), tensors, {"quant_method": "fp8", "weight_block_size": None}).values()
    assert set(stored.consumes) == set(tensors)
    expected = theirs(weight, scales.view(1, 1), torch.bfloat16)
    assert same_bits(decode(stored, tensors, torch.bfloat16), expected)


def test_exponents_as_scales() -> None:
    weight, exponents = codes_of((256, 128)), torch.tensor([[0], [130]], dtype=torch.uint8)
    expected = theirs(weight, exponents, torch.float32)
    assert same_bits(ours(both(weight, exponents), torch.float32, SETTINGS), expected)
    if hasattr(torch, "float8_e8m0fnu"):
        made = ours(both(weight, exponents.view(torch.float8_e8m0fnu)), torch.float32, SETTINGS)
        assert same_bits(made, theirs(weight, exponents.view(torch.float8_e8m0fnu), torch.float32))


def test_more_than_is_decoded_at_a_time_is_decoded_whole() -> None:
    weight, scales = codes_of((5000, 258)), scales_of((40, 3))
    each = scales.repeat_interleave(128, 0)[:5000].repeat_interleave(128, 1)[:, :258]
    assert same_bits(ours(both(weight, scales), torch.float32, SETTINGS), weight.to(torch.float32) * each)


def test_codes_that_cannot_be_are_refused_by_name() -> None:
    weight, scales = codes_of((200, 130)), scales_of((2, 2))
    with pytest.raises(MissingTensorError, match=r"a\.weight.*a\.weight_scale_inv"):
        find(Fp8Format(), {"a.weight": weight}, SETTINGS)
    for shape in ((3, 2), (7,), (2, 2, 2), (0, 2)):
        with pytest.raises(ShapeMismatchError, match=r"a\.weight_scale_inv"):
            find(Fp8Format(), both(weight, scales_of(shape)), SETTINGS)
    with pytest.raises(UnsupportedError, match=r"a\.weight_scale_inv.*int32"):
        find(Fp8Format(), both(weight, scales.to(torch.int32)), SETTINGS)
    with pytest.raises(UnsupportedError, match=r"a\.weight.*float8_e5m2"):
        find(Fp8Format(), both(weight.view(torch.float8_e5m2), scales), SETTINGS)
    for bad in (float("nan"), float("inf")):
        tensors = both(weight, scales.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(bad)))
        (stored,) = find(Fp8Format(), tensors, SETTINGS).values()
        with pytest.raises(WeightsFormatError, match=rf"a\.weight_scale_inv.*{bad}.*element 2"):
            decode(stored, tensors, torch.float32)
    spoiled = weight.view(torch.uint8).index_fill(1, torch.tensor(3), 0xFF).view(torch.float8_e4m3fn)
    (stored,) = find(Fp8Format(), both(spoiled, scales), SETTINGS).values()
    with pytest.raises(WeightsFormatError, match=r"a\.weight'.*NaN"):
        decode(stored, both(spoiled, scales), torch.float32)


def test_another_formats_checkpoint_is_left_alone() -> None:
    assert find(Fp8Format(), both(codes_of((4, 4)), scales_of(())), {"quant_method": "mxfp4"}) == {}
    assert find(Fp8Format(), {"a.weight": torch.zeros(4, 4), "a.weight_scale": torch.ones(())}) == {}
