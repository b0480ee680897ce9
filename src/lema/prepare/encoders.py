"""Tensors made into codes: which tensors a format keeps for one, and what is in them.

Formats are those of `storage/codecs`, written as the libraries that own them write them. Which tensors become codes is
decided elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from ..storage.codecs.bitsandbytes import NF4

Declared = tuple[str, torch.dtype, tuple[int, ...]]
_BLOCK, _NESTED = 64, 256
_STATE_BYTES = 512
"""Of the JSON beside 4-bit codes, filled up with spaces: its length has to be known before its numbers are."""
_E4M3_MAX = 448.0


class Encoder(Protocol):
    """One format, written."""

    name: str
    """As `--quantize` says it."""

    def declared(self, name: str, shape: tuple[int, ...]) -> list[Declared]:
        """Names, types and shapes of the tensors that are kept for one, the codes first."""

    def encode(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Their contents.

        Args:
            dtype: what the codes are decoded to.
            pieces: the tensor's elements in row-major order, as one-dimensional tensors that follow each other.
        """

    def settings(self, dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json.

        Args:
            dtype: what the codes are decoded to.
            kept: modules that transformers would take for quantised ones, and are not.
        """


class NF4Encoder:
    """bitsandbytes' NF4 in blocks of 64, its scales quantised again: 4.127 bits a value."""

    name = "nf4"

    def declared(self, name: str, shape: tuple[int, ...]) -> list[Declared]:
        """See `Encoder`."""
        blocks = -(-math.prod(shape) // _BLOCK)
        return [
            (name, torch.uint8, (-(-math.prod(shape) // 2), 1)),
            (f"{name}.absmax", torch.uint8, (blocks,)),
            (f"{name}.nested_absmax", torch.float32, (-(-blocks // _NESTED),)),
            (f"{name}.nested_quant_map", torch.float32, (256,)),
            (f"{name}.quant_map", torch.float32, (16,)),
            (f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (_STATE_BYTES,)),
        ]

    def encode(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As bitsandbytes' `quantize_4bit` with `compress_statistics`, code for code."""
        parts = [_nf4_codes(part.to(torch.float32)) for part in _recut(pieces, _BLOCK)]
        absmax = torch.cat([scales for _, scales in parts])
        offset = absmax.mean()
        codes, nested = _dynamic_codes(absmax - offset)
        state = {
            "quant_type": "nf4", "blocksize": _BLOCK, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape),
            "nested_blocksize": _NESTED, "nested_dtype": "float32", "nested_offset": offset.item(),
        }  # fmt: skip
        text = json.dumps(state).encode().ljust(_STATE_BYTES)
        return {
            name: torch.cat([part for part, _ in parts]).view(-1, 1),
            f"{name}.absmax": codes,
            f"{name}.nested_absmax": nested,
            f"{name}.nested_quant_map": dynamic_map(),
            f"{name}.quant_map": torch.tensor(NF4),
            f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }

    def settings(self, dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), "llm_int8_skip_modules": list(kept),
        }  # fmt: skip


class Int8Encoder:
    """bitsandbytes' LLM.int8(): a scale a row."""

    name = "int8"

    def declared(self, name: str, shape: tuple[int, ...]) -> list[Declared]:
        """See `Encoder`."""
        return [
            (name, torch.int8, shape),
            (f"{name.removesuffix('.weight')}.SCB", torch.float32, (math.prod(shape[:-1]),)),
            (f"{name}_format", torch.uint8, ()),
        ]

    def encode(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As bitsandbytes' `int8_vectorwise_quant`; a row of zeros stays one."""
        codes, scales = [], []
        for part in _recut(pieces, shape[-1]):
            rows = part.to(torch.float32).view(-1, shape[-1])
            largest = rows.abs().amax(1)
            codes.append(torch.round(rows * (127.0 / largest.clamp_min(1e-38))[:, None]).to(torch.int8))
            scales.append(largest)
        return {
            name: torch.cat(codes).view(shape),
            f"{name.removesuffix('.weight')}.SCB": torch.cat(scales),
            f"{name}_format": torch.tensor(0, dtype=torch.uint8),
        }

    def settings(self, dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(kept),
        }  # fmt: skip


class FP8Encoder:
    """FP8 (E4M3) with a scale for every block of 128 x 128, as DeepSeek and Qwen publish it (DeepSeek-V3, arXiv
    2412.19437)."""

    name = "fp8"
    block = 128

    def declared(self, name: str, shape: tuple[int, ...]) -> list[Declared]:
        """See `Encoder`."""
        rows, columns = (-(-size // self.block) for size in shape[-2:])
        return [
            (name, torch.float8_e4m3fn, shape),
            (f"{name}_scale_inv", torch.float32, (*shape[:-2], rows, columns)),
        ]

    def encode(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The largest magnitude of a block becomes the type's largest number."""
        codes, scales = [], []
        for part in _recut(pieces, shape[-2] * shape[-1]):
            matrix = part.to(torch.float32).view(shape[-2:])
            scale = _block_amax(matrix, self.block).clamp_min(1e-30) / _E4M3_MAX
            spread = scale.repeat_interleave(self.block, 0)[: shape[-2]]
            spread = spread.repeat_interleave(self.block, 1)[:, : shape[-1]]
            codes.append((matrix / spread).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn))
            scales.append(scale)
        (_, _, shape_of_codes), (scale_name, _, shape_of_scales) = self.declared(name, shape)
        return {
            name: torch.stack([code.view(torch.uint8) for code in codes])
            .view(torch.float8_e4m3fn)
            .view(shape_of_codes),
            scale_name: torch.stack(scales).view(shape_of_scales),
        }

    def settings(self, dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [self.block, self.block],
            "modules_to_not_convert": list(kept),
        }  # fmt: skip


ENCODERS: Mapping[str, Encoder] = {encoder.name: encoder for encoder in (NF4Encoder(), Int8Encoder(), FP8Encoder())}
"""Formats that can be written, by what `--quantize` says for them."""


@lru_cache(maxsize=1)
def _nf4_bounds() -> torch.Tensor:
    table = torch.tensor(NF4)
    return (table[:-1] + table[1:]) / 2


def _nf4_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two a byte, and scales of float32 values, whole blocks but for the last."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % _BLOCK)).view(-1, _BLOCK)
    absmax = padded.abs().amax(1)
    scaled = (padded * (1.0 / absmax.clamp_min(1e-38))[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(scaled.view(-1), _nf4_bounds(), out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2])[: -(-count // 2)], absmax


@lru_cache(maxsize=1)
def dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit codes, float32 and ascending (Dettmers, arXiv 1511.04561): a sign,
    an exponent of ten in as many bits as it takes, and a fraction linear in the bits that are left."""
    values = [0.0, 1.0]
    for exponent in range(7):
        fractions = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (fractions[:-1] + fractions[1:]) / 2
        values += ((10 ** (exponent - 6)) * means).tolist()
        values += (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values))


def _dynamic_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes of the dynamic map, and the scale of every block of 256."""
    count, table = values.numel(), dynamic_map()
    padded = torch.nn.functional.pad(values, (0, -count % _NESTED)).view(-1, _NESTED)
    absmax = padded.abs().amax(1)
    scaled = (padded / absmax.clamp_min(1e-38)[:, None]).view(-1)
    return torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)[:count], absmax


def _block_amax(matrix: torch.Tensor, block: int) -> torch.Tensor:
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix.abs(), (0, -columns % block, 0, -rows % block))
    return padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block).amax((1, 3))


def _recut(pieces: Iterable[torch.Tensor], multiple: int) -> Iterator[torch.Tensor]:
    """The same elements in tensors that are multiples of a count, the last perhaps not; valid until the next."""
    rest: list[torch.Tensor] = []
    held = 0
    for piece in pieces:
        held += piece.numel()
        whole = held - held % multiple
        if not whole:
            rest.append(piece.clone())
            continue
        cut = piece.numel() - (held - whole)
        yield torch.cat([*rest, piece[:cut]]) if rest else piece[:cut]
        rest, held = ([piece[cut:].clone()] if held > whole else []), held - whole
    if rest:
        yield torch.cat(rest)
