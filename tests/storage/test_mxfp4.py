"""MXFP4 as gpt-oss's files have it, beside transformers' own decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from codec_helpers import decode, find, same_bits
from lema.errors import MissingTensorError, ShapeMismatchError, WeightsFormatError
from lema.storage.codecs.mxfp4 import Mxfp4Format

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"quant_method": "mxfp4"}


def tensors_of(blocks: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"experts.up_blocks": blocks, "experts.up_scales": scales}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_under_every_scale_is_transformers_value(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    blocks = codes.expand(255, 16, 16).reshape(1, 255 * 16, 1, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).repeat_interleave(16).view(1, 255 * 16, 1)
    tensors = tensors_of(blocks, scales)
    (stored,) = find(Mxfp4Format(), tensors, SETTINGS).values()
    assert same_bits(decode(stored, tensors, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 5)), st.sampled_from(TYPES), st.integers(0, 2**31)
)
def test_any_size_is_transposed_as_transformers_does(size: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=make)
    scales = torch.randint(0, 255, size, dtype=torch.uint8, generator=make)
    tensors = tensors_of(blocks, scales)
    (stored,) = find(Mxfp4Format(), tensors).values()
    assert stored.name == "experts.up" and stored.shape == (size[0], size[2] * 32, size[1])
    assert set(stored.consumes) == set(tensors)
    assert same_bits(decode(stored, tensors, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_more_than_is_decoded_at_a_time_is_decoded_whole() -> None:
    blocks = torch.randint(0, 256, (2, 4100, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 4100, 5), dtype=torch.uint8)
    tensors = tensors_of(blocks, scales)
    (stored,) = find(Mxfp4Format(), tensors).values()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert same_bits(decode(stored, tensors, torch.float32), expected)


def test_codes_that_cannot_be_are_refused_by_name() -> None:
    blocks, scales = torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.uint8)
    with pytest.raises(MissingTensorError, match=r"experts\.up_scales"):
        find(Mxfp4Format(), {"experts.up_blocks": blocks}, SETTINGS)
    for wrong in (scales[:, :2], scales.to(torch.int32), scales.view(2, 12)):
        with pytest.raises(ShapeMismatchError, match=r"experts\.up_scales"):
            find(Mxfp4Format(), tensors_of(blocks, wrong), SETTINGS)
    with pytest.raises(ShapeMismatchError, match=r"experts\.up_blocks"):
        find(Mxfp4Format(), tensors_of(blocks[..., :8], scales), SETTINGS)
    tensors = tensors_of(blocks, scales.index_fill(2, torch.tensor(1), 255))
    (stored,) = find(Mxfp4Format(), tensors).values()
    with pytest.raises(WeightsFormatError, match=r"experts\.up_scales.*255.*element 1"):
        decode(stored, tensors, torch.float32)


def test_another_formats_checkpoint_is_left_alone() -> None:
    tensors = tensors_of(torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.uint8))
    assert find(Mxfp4Format(), tensors, {"quant_method": "gptq"}) == {}
    assert find(Mxfp4Format(), {"a_blocks": torch.zeros(2, 3)}) == {}
