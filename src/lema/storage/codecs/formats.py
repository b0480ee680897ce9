"""The formats of codes that are known, and which of a checkpoint's tensors they keep.

A new format is a file beside this one and a name in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..header import TensorRecord
from .awq import AwqFormat
from .base import Format, Stored
from .bitsandbytes import Bitsandbytes
from .compressed_tensors import CompressedTensorsFormat
from .fp8 import Fp8Format
from .gptq import GptqFormat
from .mxfp4 import Mxfp4Format

FORMATS: tuple[Format, ...] = (
    Bitsandbytes(),
    Mxfp4Format(),
    CompressedTensorsFormat(),
    Fp8Format(),
    GptqFormat(),
    AwqFormat(),
)


def methods() -> frozenset[str]:
    """What `quant_method` may say in config.json for weights that can be decoded."""
    return frozenset().union(*(known.methods for known in FORMATS))


def bits_of(method: str, settings: Mapping[str, Any], dims: int) -> float | None:
    """Bits a value takes in files quantised by a method, as its settings say; None where it is no code, or they do not.

    Args:
        dims: of the tensor: experts have three.
    """
    able = (known for known in FORMATS if method in known.methods and dims >= (3 if known.experts_only else 2))
    return next((bits for known in able if (bits := known.bits(settings)) is not None), None)


def find_stored(records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
    """Every tensor of a checkpoint that is kept as codes, by the name it has in one without; see `Format.find`."""
    found: dict[str, Stored] = {}
    for known in FORMATS:
        for name, stored in known.find(records, settings).items():
            assert name not in found, f"{name} is claimed by {known.name} and another format"
            found[name] = stored
    return found
