"""The arithmetic of GGUF's block formats: bytes of blocks to float32.

Format: ggml's `block_q4_0` and so on, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, and the values
those of gguf-py's `dequantize`. A block is a row of bytes: halves (float16) that scale it, then codes, whose bits are
spread so that a few wide operations take them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One of ggml's formats."""

    values: int
    """Of a block."""
    nbytes: int
    """Of a block."""
    halves: tuple[int, ...]
    """Where in a block its float16 scales begin."""
    decode: Callable[[torch.Tensor], torch.Tensor]
    """uint8 `[n, nbytes]` -> float32 `[n, values]`."""


def half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number at a byte of each block, as float32 `[n, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _shifted(codes: torch.Tensor, *shifts: int) -> torch.Tensor:
    """Codes under each shift: uint8 `[n, k, m]` -> `[n, k, shifts, m]`."""
    return torch.stack([codes >> shift if shift else codes for shift in shifts], 2)


def _nibbles(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Low halves of `width` bytes, then their high halves: uint8 `[n, m]` -> `[n, 2 m]`."""
    codes = codes.reshape(len(codes), -1, width)
    return torch.stack((codes & 15, codes >> 4), 2).view(len(codes), -1)


def _bits(codes: torch.Tensor) -> torch.Tensor:
    """Bits, the lowest first: uint8 `[n, m]` -> `[n, 8 m]`."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> places) & 1).view(len(codes), -1)


def _grouped(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Codes times the scale of their group: float32 `[n, groups]`, `[n, values]` -> float32 `[n, values]`."""
    values = codes.to(torch.float32).view(*scales.shape, -1)
    return values.mul_(scales.unsqueeze(-1))


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:], 16).to(torch.float32).sub_(8).mul_(half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:], 16).to(torch.float32).mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | (_bits(blocks[:, 2:6]) << 4)
    return codes.to(torch.float32).sub_(16).mul_(half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | (_bits(blocks[:, 4:8]) << 4)
    return codes.to(torch.float32).mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32).mul_(half(blocks, 0))


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, :16]
    multiply = half(blocks, 80) * (scales & 15).to(torch.float32)
    subtract = half(blocks, 82) * (scales >> 4).to(torch.float32)
    codes = _shifted(blocks[:, 16:80].reshape(-1, 2, 32), 0, 2, 4, 6) & 3
    return _grouped(multiply, codes).sub_(subtract.unsqueeze(-1)).view(-1, 256)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, 96:104], 8)
    high = _shifted(blocks[:, 104:108].unsqueeze(1), 0, 2, 4, 6).view(-1, 16) & 3
    scales = (low | (high << 4)).to(torch.float32).sub_(32).mul_(half(blocks, 108))
    codes = _shifted(blocks[:, 32:96].reshape(-1, 2, 32), 0, 2, 4, 6) & 3
    above = _shifted(blocks[:, :32].unsqueeze(1), *range(8)) & 1  # a bit that is not set takes 4 away
    codes = codes.view(-1, 256).to(torch.int8) - ((above.view(-1, 256) ^ 1) << 2).to(torch.int8)
    return _grouped(scales, codes).view(-1, 256)


def _scales_of_k(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each: uint8 `[n, 12]` -> float32 `[n, 8]` twice."""
    first, second, rest = packed.reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return scales.to(torch.float32), minima.to(torch.float32)


def _with_minima(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_of_k(blocks[:, 4:16])
    made = _grouped(scales.mul_(half(blocks, 0)), codes)
    return made.sub_(minima.mul_(half(blocks, 2)).unsqueeze(-1)).view(-1, 256)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _with_minima(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    above = _shifted(blocks[:, 16:48].unsqueeze(1), *range(8)) & 1
    return _with_minima(blocks, _nibbles(blocks[:, 48:], 32) | (above.view(-1, 256) << 4))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, :128], 64)
    high = _shifted(blocks[:, 128:192].reshape(-1, 2, 32), 0, 2, 4, 6) & 3
    codes = (low | (high.view(-1, 256) << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].view(torch.int8).to(torch.float32)
    return _grouped(scales.mul_(half(blocks, 208)), codes).view(-1, 256)


@lru_cache(maxsize=4)
def _iq4_values(device: torch.device) -> torch.Tensor:
    return torch.tensor(_IQ4, dtype=torch.float32, device=device)


def _iq4(codes: torch.Tensor) -> torch.Tensor:
    return _iq4_values(codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _iq4(_nibbles(blocks[:, 2:], 16)).mul_(half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    places = torch.arange(0, 16, 2, dtype=torch.int32, device=blocks.device)
    high = blocks[:, 2:4].contiguous().view(torch.int16).to(torch.int32).bitwise_right_shift(places) & 3
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), -1).view(-1, 8)
    scales = (low.to(torch.int32) | (high << 4)).to(torch.float32).sub_(32).mul_(half(blocks, 0))
    return _iq4(_nibbles(blocks[:, 8:], 16)).view(-1, 8, 32).mul_(scales.unsqueeze(-1)).view(-1, 256)


BLOCKS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, (0,), _q4_0),
    "Q4_1": BlockFormat(32, 20, (0, 2), _q4_1),
    "Q5_0": BlockFormat(32, 22, (0,), _q5_0),
    "Q5_1": BlockFormat(32, 24, (0, 2), _q5_1),
    "Q8_0": BlockFormat(32, 34, (0,), _q8_0),
    "Q2_K": BlockFormat(256, 84, (80, 82), _q2_k),
    "Q3_K": BlockFormat(256, 110, (108,), _q3_k),
    "Q4_K": BlockFormat(256, 144, (0, 2), _q4_k),
    "Q5_K": BlockFormat(256, 176, (0, 2), _q5_k),
    "Q6_K": BlockFormat(256, 210, (208,), _q6_k),
    "IQ4_NL": BlockFormat(32, 18, (0,), _iq4_nl),
    "IQ4_XS": BlockFormat(256, 136, (0,), _iq4_xs),
}
"""By gguf's names."""
