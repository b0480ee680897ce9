"""Weights as bitsandbytes saves them: 4 bits (NF4 and FP4, scales in float32 or quantised again) and 8 bits.

4 bits, of `NAME.weight` (Dettmers et al., QLoRA, arXiv 2305.14314; bitsandbytes' `QuantState.as_dict`):

| tensor | holds |
|---|---|
| `NAME.weight` | codes, two a byte, the first in the high half; `[n / 2, 1]`, of uint8 or bytes of another type |
| `NAME.weight.absmax` | a scale for every `blocksize` values in row-major order: float32, or uint8 codes of them |
| `NAME.weight.quant_map` | the 16 values, float32 |
| `NAME.weight.nested_absmax`, `.nested_quant_map` | scales of the scales' codes and their 256 values, both float32 |
| `NAME.weight.quant_state.bitsandbytes__nf4` (or `fp4`) | JSON as bytes: shape, type, block sizes, the scales' offset |

8 bits (LLM.int8(), arXiv 2208.07339): int8 `NAME.weight` `[rows, columns]`, `NAME.SCB` with the largest magnitude of
each row in float32, and `NAME.weight_format`, which is 0 for rows as they are. bitsandbytes itself has linear modules
only; experts in one tensor of three dimensions are `prepare`'s, as matrices one after the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...errors import MissingTensorError, UnsupportedError, WeightsFormatError
from ..header import TensorRecord, show
from ..pieces import read_elements
from .base import Codec, Format, Run, Stored
from .lookup import decode_pairs

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of NF4 codes, as bitsandbytes has them."""
FP4 = tuple(
    struct.unpack("f", struct.pack("f", sign * value / 12))[0]
    for sign in (1, -1)
    for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)
"""Values of FP4 codes: a sign, two bits of exponent, one of mantissa, over their largest."""
_VALUES = {"nf4": NF4, "fp4": FP4}
_STATE = ".quant_state.bitsandbytes__"
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_BY_127 = 7.874015718698502e-3
"""What bitsandbytes multiplies by to divide by 127."""
_VALUES_AT_A_TIME = 1 << 18
_AGAIN = "Download the file again, or save the model again with transformers"


@dataclass(frozen=True, slots=True)
class NestedScales:
    """How scales are kept as codes: `table[code] * scale of its block + offset`."""

    scales: TensorRecord
    table: tuple[float, ...]
    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class FourBits(Codec):
    """4-bit codes with a scale a block."""

    codes: TensorRecord
    absmax: TensorRecord
    table: tuple[float, ...]
    block: int
    dtype: torch.dtype
    """What bitsandbytes decodes to; values are rounded to it, whatever they are computed with."""
    nested: NestedScales | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes, scales and, where those are codes, their scales."""
        records = (self.codes, self.absmax, *([self.nested.scales] if self.nested is not None else []))
        return tuple(_whole(record) for record in records)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As bitsandbytes' `dequantize_4bit`, then cast to `out`'s type where that is another."""
        codes = stored[0].view(torch.uint8)
        decode_pairs(codes, self.table, self._scales(stored), self.block, out.view(-1), self.dtype)

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales that are not numbers."""
        last = self.absmax if self.nested is None else self.nested.scales
        _check_finite(last, stored[-1])

    def _scales(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Float32 `[blocks]`."""
        if self.nested is None:
            return stored[1]
        table = _on(self.nested.table, stored[1].device)
        values, block = table[stored[1].to(torch.int32)], self.nested.block
        whole = values.numel() - values.numel() % block
        values[:whole].view(-1, block).mul_(stored[2][: whole // block, None])
        if whole < values.numel():
            values[whole:].mul_(stored[2][-1])
        return values.add_(self.nested.offset)


@dataclass(frozen=True, slots=True)
class EightBits(Codec):
    """Int8 rows with a scale each."""

    codes: TensorRecord
    scales: TensorRecord

    @property
    def runs(self) -> tuple[Run, ...]:
        """Codes and scales."""
        return _whole(self.codes), _whole(self.scales)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As bitsandbytes' `int8_vectorwise_dequant`, which is in float32, then cast to `out`'s type."""
        columns = self.codes.shape[-1]
        codes, values = stored[0].view(-1, columns), out.view(-1, columns)
        step = max(1, _VALUES_AT_A_TIME // columns)
        for first in range(0, len(codes), step):
            scale = stored[1][first : first + step, None]
            values[first : first + step] = codes[first : first + step].to(torch.float32).mul_(scale).mul_(_BY_127)

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales that are not numbers."""
        _check_finite(self.scales, stored[1])


class Bitsandbytes(Format):
    """Checkpoints of transformers' `BitsAndBytesConfig`, and others with tensors of these names."""

    name = "bitsandbytes"
    methods = frozenset({"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"})

    def bits(self, settings: Mapping[str, Any]) -> float:
        """In blocks of 64, which transformers asks for."""
        if settings.get("load_in_8bit"):
            return 8.0
        return 4 + 8 / 64 + 32 / (64 * 256) if settings.get("bnb_4bit_use_double_quant") else 4 + 32 / 64

    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """By the names that stand beside codes; see `Format.find`."""
        found = {}
        for name, record in records.items():
            weight, state, kind = name.rpartition(_STATE)
            if state:
                found[weight] = _four_bits(records, weight, kind, record)
            elif name.endswith(".SCB"):
                stem = name.removesuffix(".SCB")
                weight = stem if stem in records else f"{stem}.weight"
                found[weight] = _eight_bits(records, weight, record)
        if settings is not None and settings.get("quant_method", "bitsandbytes") in self.methods:
            for name, record in records.items():
                if name.endswith(".weight") and name not in found and record.dtype in (torch.uint8, torch.int8):
                    beside = "SCB" if record.dtype == torch.int8 else f"weight{_STATE}nf4"
                    raise MissingTensorError(
                        f"{record.file}: {show(name)} holds codes of bitsandbytes ({record.dtype}), and "
                        f"{show(name.removesuffix('weight') + beside)}, which says what they stand for, is not there. "
                        f"{_AGAIN}."
                    )
        return found


def _four_bits(records: Mapping[str, TensorRecord], name: str, kind: str, state: TensorRecord) -> Stored:
    settings = _read_state(state)
    count = math.prod(settings.shape)
    codes, absmax = _beside(records, state, name), _beside(records, state, f"{name}.absmax")
    _check_length(codes, codes.nbytes, -(-count // 2), "bytes of codes")
    blocks = -(-count // settings.block)
    consumes = [name, absmax.name, f"{name}.quant_map", state.name]
    table = _read_table(_beside(records, state, f"{name}.quant_map"), 16)
    if settings.kind != kind or table != _VALUES[kind]:
        raise UnsupportedError(
            f"{state.file}: {show(name)}: its values are those of {show(settings.kind)} with {show(list(table))}, and "
            f"not the ones of {kind} that bitsandbytes decodes with"
        )
    nested = None
    if settings.nested_block:
        scales = _beside(records, state, f"{name}.nested_absmax")
        consumes += [scales.name, f"{name}.nested_quant_map"]
        values = _read_table(_beside(records, state, f"{name}.nested_quant_map"), 256)
        _check_scales(scales, torch.float32, -(-blocks // settings.nested_block))
        nested = NestedScales(scales, values, settings.nested_block, settings.nested_offset)
    _check_scales(absmax, torch.float32 if nested is None else torch.uint8, blocks)
    codec = FourBits(codes, absmax, table, settings.block, settings.dtype, nested)
    return Stored(name, settings.shape, settings.dtype, codec, tuple(consumes))


def _eight_bits(records: Mapping[str, TensorRecord], name: str, scales: TensorRecord) -> Stored:
    codes = _beside(records, scales, name)
    if codes.dtype != torch.int8 or len(codes.shape) < 2:
        raise WeightsFormatError(
            f"{codes.file}: {show(name)} is {codes.dtype} {list(codes.shape)}, and beside {show(scales.name)} should "
            f"be int8 codes of two or more dimensions. {_AGAIN}."
        )
    _check_scales(scales, torch.float32, math.prod(codes.shape[:-1]))
    consumes = [name, scales.name]
    layout = records.get(f"{name}_format")
    if layout is not None:
        consumes.append(layout.name)
        number = int(_read(layout)[0]) if layout.nbytes else 0
        if number:
            raise UnsupportedError(
                f"{layout.file}: {show(name)} has its codes in an order for one kind of card ({show(layout.name)} is "
                f"{number}). Load the model with an older bitsandbytes and save it again with rows as they are"
            )
    return Stored(name, codes.shape, torch.float32, EightBits(codes, scales), tuple(consumes))


@dataclass(frozen=True, slots=True)
class _State:
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    nested_block: int
    nested_offset: float


def _read_state(record: TensorRecord) -> _State:
    where = f"{record.file}: {show(record.name)}"
    try:
        values = json.loads(bytes(_read(record).numpy()).decode("utf-8"))
    except ValueError as error:
        raise WeightsFormatError(f"{where}: is no JSON: {error}. {_AGAIN}.") from error
    if not isinstance(values, dict):
        raise WeightsFormatError(f"{where}: is {show(values)} and no object. {_AGAIN}.")
    kind, shape, block = values.get("quant_type"), values.get("shape"), values.get("blocksize")
    nested, offset = values.get("nested_blocksize", 0), values.get("nested_offset", 0.0)
    dtype = _TYPES.get(str(values.get("dtype")))
    sizes = tuple(shape) if isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape) else ()
    numbers = type(nested) is int and nested >= 0 and isinstance(offset, int | float) and math.isfinite(offset)
    if kind not in _VALUES or not sizes or block not in _BLOCKS or dtype is None or not numbers:
        raise WeightsFormatError(
            f"{where}: says {show(values)}, where quant_type is nf4 or fp4, shape a list of sizes, blocksize one of "
            f"{_BLOCKS}, dtype one of {tuple(_TYPES)}, and nested_blocksize and nested_offset are numbers. {_AGAIN}."
        )
    if nested and values.get("nested_dtype", "float32") != "float32":
        raise UnsupportedError(f"{where}: scales decoded to {show(values['nested_dtype'])}, not to float32")
    return _State(kind, sizes, dtype, block, nested, float(offset))


def _read_table(record: TensorRecord, count: int) -> tuple[float, ...]:
    _check_scales(record, torch.float32, count)
    table = _floats(bytes(_read(record).view(torch.uint8).numpy()))
    if not all(map(math.isfinite, table)):
        raise WeightsFormatError(f"{record.file}: {show(record.name)} holds values that are no numbers. {_AGAIN}.")
    return table


@lru_cache(maxsize=64)
def _floats(raw: bytes) -> tuple[float, ...]:
    """One object for the tables of all tensors, which are the same."""
    return struct.unpack(f"<{len(raw) // 4}f", raw)


@lru_cache(maxsize=64)
def _on(table: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


def _beside(records: Mapping[str, TensorRecord], known: TensorRecord, name: str) -> TensorRecord:
    record = records.get(name)
    if record is None:
        raise MissingTensorError(
            f"{known.file}: {show(name)} is not there, and {show(known.name)} says that it should be. {_AGAIN}."
        )
    return record


def _check_scales(record: TensorRecord, dtype: torch.dtype, count: int) -> None:
    if record.dtype != dtype:
        raise WeightsFormatError(
            f"{record.file}: {show(record.name)} is of type {record.dtype}, where {dtype} should be. {_AGAIN}."
        )
    _check_length(record, math.prod(record.shape), count, "values")


def _check_length(record: TensorRecord, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise WeightsFormatError(
            f"{record.file}: {show(record.name)} holds {found} {what}, where {wanted} should be. {_AGAIN}."
        )


def _check_finite(record: TensorRecord, scales: torch.Tensor) -> None:
    bad = int(torch.count_nonzero(~torch.isfinite(scales)))
    if bad:
        raise WeightsFormatError(
            f"{record.file}: {show(record.name)}: {bad} of its {scales.numel()} scales are no finite numbers. {_AGAIN}."
        )


def _whole(record: TensorRecord) -> Run:
    return Run(record, 0, math.prod(record.shape))


def _read(record: TensorRecord) -> torch.Tensor:
    return read_elements(record, 0, math.prod(record.shape))
