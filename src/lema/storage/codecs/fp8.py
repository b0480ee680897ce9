"""FP8 weights (E4M3, without infinities) with a scale a block, a row or a tensor.

Format: OCP 8-bit Floating Point Specification 1.0; torch's `float8_e4m3fn`. Files: `NAME` float8_e4m3fn `[.., out, in]`
and beside it `NAME_scale_inv` (DeepSeek, Qwen, Ministral: `[.., ceil(out / 128), ceil(in / 128)]`, or one number) or
`NAME_scale` (compressed-tensors, FBGEMM: a scale a row, `[out, 1]` or `[out]`, or one number). Scales are floats, or
exponents plus 127 in a byte (E8M0). A value is code times scale in float32, as in transformers' `Fp8Dequantize`; blocks
are counted from the first row and column, so that a last one may be partial, as in DeepSeek's own kernels.
compressed-tensors multiplies in the type of its scales, and so its files are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...errors import MissingTensorError, ShapeMismatchError, UnsupportedError, WeightsFormatError
from ..header import TensorRecord, show
from .base import Codec, Format, Run, Stored
from .records import check_finite, method_of, whole_run
from .tables import chunks, look_up_pairs, pairs

_CODES = torch.float8_e4m3fn
_OTHERS = tuple(
    getattr(torch, name) for name in ("float8_e5m2", "float8_e5m2fnuz", "float8_e4m3fnuz") if hasattr(torch, name)
)
_EXPONENTS = (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_USUAL = (128, 128)


@dataclass(frozen=True, slots=True)
class Fp8(Codec):
    """Codes `[batch, rows, columns]`, a scale for each block of them."""

    codes: TensorRecord
    scales: TensorRecord
    grid: tuple[int, int]
    """Scales over rows and columns of one matrix."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    rounded: torch.dtype = torch.float32
    """The type the product is rounded to before it becomes the parameter's."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes, then scales."""
        return whole_run(self.codes), whole_run(self.scales)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`out` has the codes' shape."""
        rows, columns = self.codes.shape[-2:] if len(self.codes.shape) > 1 else (1, self.codes.shape[0])
        (height, width), (down, across) = self.block, self.grid
        codes, values = stored[0].view(-1, rows, columns), out.view(-1, rows, columns)
        scales = _numbers(stored[1]).view(len(codes), down, across)
        if across > 1:
            scales = scales.repeat_interleave(width, dim=-1)[..., :columns]
        for matrix, scale, target in zip(codes, scales, values, strict=True):
            for part in chunks(rows, columns, height if down > 1 else 1):
                product = _look_up(matrix[part])
                if down == 1:
                    product.mul_(scale)
                elif height == 1:
                    product.mul_(scale[part])
                else:
                    _multiply(product, scale[part.start // height : -(-part.stop // height)], height)
                target[part].copy_(product if self.rounded == out.dtype else product.to(self.rounded))

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales are finite, and no code is NaN."""
        check_finite(self.scales, _numbers(stored[1]))
        for part in chunks(len(stored[0]), 1):
            if bool((stored[0][part].view(torch.uint8).bitwise_and(127) == 127).any()):
                raise WeightsFormatError(
                    f"{self.codes.file}: tensor {show(self.codes.name)} holds codes that are NaN. "
                    "Download the file again"
                )


def _multiply(product: torch.Tensor, scale: torch.Tensor, height: int) -> None:
    """Rows of whole blocks at once, then those of a last partial one."""
    whole = len(product) // height
    if whole:
        product[: whole * height].view(whole, height, -1).mul_(scale[:whole].unsqueeze(1))
    if whole * height < len(product):
        product[whole * height :].mul_(scale[whole:])


def _numbers(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32."""
    if scales.dtype == torch.uint8:
        return scales.to(torch.float32).sub_(127.0).exp2_()
    return scales.to(torch.float32)


def _look_up(codes: torch.Tensor) -> torch.Tensor:
    """Codes as float32 numbers, `[rows, columns]`; torch's own conversion takes several times as long on a CPU."""
    if codes.device.type != "cpu" or codes.numel() % 2 or codes.storage_offset() % 2:
        return codes.to(torch.float32)
    index = codes.reshape(-1).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return look_up_pairs(_table(), index, torch.float32).view(codes.shape)


@lru_cache(maxsize=1)
def _table() -> torch.Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(_CODES).to(torch.float32)
    both = torch.arange(65536)
    return pairs(values[both & 255], values[both >> 8])


class Fp8Format(Format):
    """Weights as E4M3 codes with scales beside them."""

    name = "FP8"
    methods = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors"})

    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """Every tensor of E4M3 codes that is not itself a scale."""
        method = method_of(settings)
        if settings is not None and method not in self.methods:
            return {}
        wanted = (settings or {}).get("weight_block_size")
        found = {}
        for name, codes in records.items():
            if codes.dtype in _OTHERS:
                raise UnsupportedError(
                    f"{codes.file}: {show(name)} holds 8-bit floats of type {codes.dtype}; LEMA decodes {_CODES}"
                )
            if codes.dtype != _CODES or name.endswith(("_scale", "_scale_inv", ".scale")):
                continue
            scales = _scales(name, records)
            grid, block = _blocks(codes, scales, tuple(wanted) if wanted else _USUAL)
            dtype = scales.dtype if scales.dtype in _FLOATS else torch.bfloat16
            in_scales_type = scales.name.endswith("_scale") and method in ("compressed-tensors", None)
            rounded = dtype if in_scales_type else torch.float32
            beside = (name, scales.name, *_of_activations(name, records))
            found[name] = Stored(name, codes.shape, dtype, Fp8(codes, scales, grid, block, rounded), beside)
        return found

    def bits(self, settings: Mapping[str, Any]) -> float | None:
        """A byte, and of blocks their share of a float32 scale; of compressed-tensors another format knows."""
        if method_of(settings) == "compressed-tensors":
            return None
        block = settings.get("weight_block_size")
        return 8 + 32 / math.prod(block) if block else 8.0


def _scales(name: str, records: Mapping[str, TensorRecord]) -> TensorRecord:
    stem = name.removesuffix(".weight")
    names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
    scales = next((records[other] for other in names if other in records), None)
    if scales is None:
        raise MissingTensorError(
            f"{records[name].file}: {show(name)} holds FP8 codes, and no scale of theirs is there "
            f"({', '.join(names[:2])}). Check that every shard is there"
        )
    if scales.dtype not in (*_FLOATS, *_EXPONENTS):
        raise UnsupportedError(
            f"{scales.file}: the FP8 scales {show(scales.name)} are of type {scales.dtype}, which is not known"
        )
    return scales


def _of_activations(name: str, records: Mapping[str, TensorRecord]) -> list[str]:
    """Scales of activations, of which decoding weights has no use."""
    stem = name.removesuffix(".weight")
    names = [f"{stem}.{kind}" for kind in ("input_scale", "activation_scale", "input_zero_point", "qscale_act")]
    return [other for other in (*names, f"{name}_zero_point") if other in records]


def _blocks(
    codes: TensorRecord, scales: TensorRecord, block: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """How scales lie over a matrix: their grid, and the rows and columns that share one."""
    rows, columns = codes.shape[-2:] if len(codes.shape) > 1 else (1, codes.shape[0])
    batch = math.prod(codes.shape[:-2])
    count = math.prod(scales.shape)
    if count == batch:
        return (1, 1), (rows, columns)
    if count == batch * rows and (len(scales.shape) == 1 or scales.shape[-2:] == (rows, 1)):
        return (rows, 1), (1, columns)
    if len(scales.shape) == len(codes.shape) > 1 and scales.shape[:-2] == codes.shape[:-2]:
        down, across = scales.shape[-2:]
        if (down, across) == (-(-rows // block[0]), -(-columns // block[1])):
            return (down, across), (block[0], block[1])
        if down and across and rows % down == 0 and columns % across == 0:
            return (down, across), (rows // down, columns // across)
    raise ShapeMismatchError(
        f"{codes.file}: FP8 codes {show(codes.name)} of shape {list(codes.shape)} and scales {show(scales.name)} of "
        f"shape {list(scales.shape)} do not belong together: expected one scale, one a row, or one for each block of "
        f"{block[0]} x {block[1]}. Download the file again"
    )
