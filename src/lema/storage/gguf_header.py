"""The header of one GGUF file, turned into records; gguf-py reads it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It knows files, types and offsets; what the tensors
are to a model it leaves to others.
"""

from __future__ import annotations

import importlib.util
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError, WeightsError, WeightsFormatError, WeightsNotFoundError
from ..libraries import how_to_install
from .codecs.gguf import GgufRecord
from .codecs.gguf_blocks import BLOCKS
from .header import Header, open_weights, show

SUFFIX = ".gguf"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix == SUFFIX and path.is_file()


def split_files(file: Path) -> list[Path]:
    """All files of a model of which one is given; a model in one file is that file.

    Raises:
        WeightsNotFoundError: one of them is missing.
    """
    found = _SPLIT.fullmatch(file.name)
    if found is None:
        return [file]
    stem, count = found[1], int(found[3])
    files = [file.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in files if not part.is_file()]:
        raise WeightsNotFoundError(f"{file}: of the {count} files of this model {', '.join(missing[:4])} is missing")
    return files


def check_gguf(source: Path) -> None:
    """Refuse what is no GGUF file, or cannot be read here.

    Raises:
        WeightsError: the `gguf` package is not installed. WeightsNotFoundError, WeightsFormatError: no such file, or
            another.
    """
    if importlib.util.find_spec("gguf") is None:
        raise WeightsError(f"Reading GGUF needs the gguf package. Install it: {how_to_install('gguf')}.")
    if not source.is_file():
        raise WeightsNotFoundError(f"{source}: no such file.")
    with open_weights(source) as stream:
        if stream.read(4) != b"GGUF":
            raise WeightsFormatError(f"{source}: does not begin with GGUF, so it is no GGUF file.")


def open_gguf(source: Path) -> Any:
    """gguf's reader of a file.

    Raises:
        WeightsFormatError: a damaged file. UnsupportedError: a type that the installed gguf does not know.
    """
    from gguf import GGUFReader

    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # numpy's and gguf's own, on a file cut short
        if "GGMLQuantizationType" in str(error):
            raise UnsupportedError(
                f"{source}: has a tensor of a type that the installed gguf package does not know: {error}."
                " Install a newer one, or take another quantisation of the model."
            ) from error
        raise WeightsFormatError(f"{source}: a damaged GGUF file: {error}. Download or install it again.") from error


def read_gguf_header(file: Path) -> Header:
    """Records of one file in the order of their bytes; the tensors' bytes are not touched.

    Raises:
        WeightsFormatError: damaged, or tensors overlap.
        UnsupportedError: a tensor of a type that LEMA does not decode, or written for a processor of other byte order.
        WeightsError, WeightsNotFoundError: see `check_gguf`.
    """
    check_gguf(file)
    status = os.stat(file)
    reader = open_gguf(file)
    if reader.byte_order != "I":
        raise UnsupportedError(f"{file}: is written for a processor with another order of bytes. Take one for this")
    records = sorted((_record(file, tensor) for tensor in reader.tensors), key=lambda record: record.offset)
    for before, after in pairwise(records):
        if before.end > after.offset:
            raise WeightsFormatError(
                f"{file}: tensor {show(after.name)} begins at byte {after.offset} and overlaps {show(before.name)}, "
                f"which ends at byte {before.end}. Download the file again."
            )
    if records and records[-1].end > status.st_size:
        raise WeightsFormatError(
            f"{file}: cut short: tensor {show(records[-1].name)} ends at byte {records[-1].end} of {status.st_size}. "
            "Download the file again."
        )
    architecture = reader.fields.get("general.architecture")
    metadata = {"format": "gguf", "architecture": "" if architecture is None else str(architecture.contents())}
    return Header(tuple(records), metadata, status.st_size, status.st_mtime_ns)


def _record(file: Path, tensor: Any) -> GgufRecord:
    kind = tensor.tensor_type.name
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if kind in _PLAIN:
        dtype = _PLAIN[kind]
    elif kind in BLOCKS:
        blocks, dtype = BLOCKS[kind], torch.uint8
        if not shape or shape[-1] % blocks.values:
            raise WeightsFormatError(
                f"{file}: tensor {show(tensor.name)} has rows of {shape[-1:]} values, and {kind} has blocks of "
                f"{blocks.values}. Download the file again."
            )
        shape = *shape[:-1], shape[-1] // blocks.values * blocks.nbytes
    else:
        raise UnsupportedError(
            f"{file}: tensor {show(tensor.name)} is of type {kind}, which LEMA does not decode; it decodes "
            f"{', '.join((*list(_PLAIN)[:3], *BLOCKS))}. Take another quantisation of the model."
        )
    return GgufRecord(tensor.name, file, int(tensor.data_offset), int(tensor.n_bytes), dtype, shape, kind)
