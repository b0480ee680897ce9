"""The header of one safetensors file: read, checked in full, turned into records.

A file is 8 bytes of little-endian header length, a JSON header (spaces may pad it), then the tensors'
bytes without gap or remainder: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from ..errors import WeightsError, WeightsFormatError, WeightsNotFoundError

__all__ = [
    "DTYPES",
    "MAX_HEADER_BYTES",
    "Header",
    "TensorRecord",
    "open_weights",
    "read_header",
    "read_json_object",
    "show",
]

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own cap
_INT64_MAX = 2**63 - 1
_DEEPEST = 120
"""Objects and lists within one another that the library's parser takes, less those around an entry."""

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F4": "float4_e2m1fn_x2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
    }.items()
    if hasattr(torch, attribute)
}
"""The format's names for types, as far as the installed torch has them."""

_CONVERT = "Load the model with transformers and call save_pretrained(), which writes safetensors."
_AGAIN = "Download or convert the file again."

_FOREIGN: tuple[tuple[bytes, str, str], ...] = (  # how a file begins, what it is, what to do
    (rb"PK\x03\x04", "a PyTorch checkpoint (a zip archive with a pickle in it)", _CONVERT),
    (rb"\x80[\x02-\x05][^\0]", "a pickle, such as an old PyTorch checkpoint", _CONVERT),
    (
        rb"GGUF",
        "a GGUF file",
        "Take the model's safetensors files, or convert it with transformers' gguf_file.",
    ),
    (rb"\x1f\x8b\x08", "gzip data", "Unpack it first."),
    (rb"\x93NUMPY", "a NumPy .npy array", "Write arrays with safetensors.numpy.save_file()."),
    (
        rb"version https://git-lfs",
        "a Git LFS pointer",
        "Run `git lfs pull` in its repository to get the file.",
    ),
    (rb"\s*<[^\0]{7}", "a web page, likely a login or error page", "Download the file with access to it."),
    (
        rb"\s*\{[^\0]{7}",
        "JSON text",
        "Give the directory; the index of a sharded model must be named *.json.",
    ),
)
"""No pattern fits the length of a header below the cap, whose bytes 4 to 7 are zero, unless it is damaged."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one tensor's bytes are, and what they mean."""

    name: str
    """Name in the file."""
    file: Path
    """The file that holds it."""
    offset: int
    """First byte, counted from the beginning of the file."""
    nbytes: int
    """Length in bytes; always shape x dtype."""
    dtype: torch.dtype
    """Type of an item. Packed F4 has two values to an item, as in torch."""
    shape: tuple[int, ...]
    """Shape in items of dtype; () is a scalar."""

    @property
    def end(self) -> int:
        """The byte after the last one, counted from the beginning of the file."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """One file's records in the order of their bytes, and the file's state when they were read."""

    records: tuple[TensorRecord, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]
    """The header's `__metadata__`; empty without one."""
    size: int
    """Length of the file in bytes."""
    mtime_ns: int
    """Time of its last change, in nanoseconds."""


def read_header(file: Path) -> Header:
    """Read and check the header of one file; the tensors' bytes are not touched.

    Stricter than the safetensors library in this: no JSON key may appear twice, which the format forbids and where
    readers differ in which of the two they take; entries are objects and types are texts, which the library's parser
    takes in other forms as well; and the sizes of a tensor without items must fit torch's 64-bit strides. Fields beside
    dtype, shape and data_offsets are passed over, as the library does.

    Raises:
        WeightsNotFoundError: no such file.
        WeightsFormatError: not safetensors, or a header that contradicts itself or the file.
        WeightsError: the file cannot be read.
    """
    with open_weights(file) as stream:
        try:
            status = os.fstat(stream.fileno())
            raw = _read_header_bytes(file, stream, status.st_size)
        except OSError as error:
            raise WeightsError(f"{file}: reading its header failed: {error.strerror}. {_AGAIN}") from error
    data_start = 8 + len(raw)
    entries = _parse_object(raw, file, "header")
    metadata = _check_metadata(file, entries.pop("__metadata__", None))
    records = [_record(file, name, entry, data_start) for name, entry in entries.items()]
    records.sort(key=lambda record: (record.offset, record.end))
    _check_coverage(file, records, data_start, status.st_size)
    return Header(tuple(records), metadata, status.st_size, status.st_mtime_ns)


def read_json_object(file: Path) -> dict[str, object]:
    """Read a JSON file that must hold one object, with the same care as a header.

    Raises:
        WeightsNotFoundError: no such file.
        WeightsFormatError: longer than MAX_HEADER_BYTES, not UTF-8, not JSON, a key twice, not an object.
        WeightsError: the file cannot be read.
    """
    with open_weights(file) as stream:
        try:
            raw = stream.read(min(os.fstat(stream.fileno()).st_size, MAX_HEADER_BYTES) + 1)
        except OSError as error:
            raise WeightsError(f"{file}: reading it failed: {error.strerror}. {_AGAIN}") from error
    if len(raw) > MAX_HEADER_BYTES:
        raise WeightsFormatError(f"{file}: an index longer than {MAX_HEADER_BYTES} bytes is refused. {_AGAIN}")
    return _parse_object(raw, file, "content")


def open_weights(file: Path) -> BufferedReader:
    """Open a weight file for reading bytes.

    Raises:
        WeightsNotFoundError: no such file, or not a regular one.
        WeightsError: it cannot be opened.
    """
    if not os.path.isfile(file):  # a FIFO would block for ever
        raise WeightsNotFoundError(f"{file}: no such regular file. Check the path, or download the model.")
    try:
        return open(file, "rb")
    except OSError as error:
        raise WeightsError(f"{file}: cannot be opened: {error.strerror}. Check its permissions.") from error


def show(value: object) -> str:
    """`repr` of a value that came from a file, cut to a bearable length and depth."""
    return _SHOW.repr(value)


_SHOW = reprlib.Repr()
_SHOW.maxstring = 200
_SHOW.maxlist = 12


def _read_header_bytes(file: Path, stream: BufferedReader, size: int) -> bytes:
    prefix = stream.read(8)
    if size == 0:
        raise WeightsFormatError(f"{file}: the file is empty (0 bytes). {_AGAIN}")
    if size < 8:
        raise WeightsFormatError(
            f"{file}: {size} bytes are too few: a safetensors file begins with 8 bytes of header length. {_AGAIN}"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _refuse_foreign(file, prefix + stream.read(64))
        raise WeightsFormatError(
            f"{file}: its first 8 bytes ask for a header of {length} bytes, above the cap of"
            f" {MAX_HEADER_BYTES}; the file is not safetensors or is damaged. {_AGAIN}"
        )
    raw = stream.read(length)
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        _refuse_foreign(file, prefix + raw[:64])
    if length > size - 8:
        raise WeightsFormatError(
            f"{file}: its first 8 bytes ask for a header of {length} bytes, but only {size - 8} follow;"
            f" the file was cut short or is not safetensors. {_AGAIN}"
        )
    return raw


def _refuse_foreign(file: Path, head: bytes) -> None:
    """Name the format of a file that is not safetensors, if its first bytes tell."""
    for beginning, what, advice in _FOREIGN:
        if re.match(beginning, head.removeprefix(b"\xef\xbb\xbf")):
            raise WeightsFormatError(f"{file}: this is {what}, not safetensors. {advice}")


def _parse_object(raw: bytes, file: Path, what: str) -> dict[str, object]:
    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            times = Counter(name for name, _ in pairs)
            twice = next(name for name in times if times[name] > 1)
            raise WeightsFormatError(f"{file}: {show(twice)} appears twice in one object of its {what}. {_AGAIN}")
        return result

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_int=_whole)
        if "\\u" in text:  # half a surrogate pair parses, and then no message with that name can be printed
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise WeightsFormatError(f"{file}: its {what} is not valid UTF-8: {error.reason}. {_AGAIN}") from error
    except RecursionError:
        raise WeightsFormatError(f"{file}: its {what} is JSON nested too deeply. {_AGAIN}") from None
    except ValueError as error:
        raise WeightsFormatError(f"{file}: its {what} is not JSON: {error}. {_AGAIN}") from error
    if not isinstance(value, dict):
        raise WeightsFormatError(f"{file}: its {what} is {show(value)}, not an object. {_AGAIN}")
    return value


def _whole(text: str) -> int | float:
    """-0 is a number with a fraction to the format's own parser, and so is no size."""
    return -0.0 if text == "-0" else int(text)


def _check_metadata(file: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WeightsFormatError(f"{file}: __metadata__ is {show(value)}, not an object of strings. {_AGAIN}")
    for key, entry in value.items():
        if not isinstance(entry, str):
            raise WeightsFormatError(
                f"{file}: __metadata__ has {show(entry)} under {show(key)}, where only strings may be. {_AGAIN}"
            )
    return value


def _record(file: Path, name: str, entry: object, data_start: int) -> TensorRecord:
    where = f"{file}: tensor {show(name)}"
    if not isinstance(entry, dict):
        raise WeightsFormatError(f"{where}: its header entry is {show(entry)}, not an object. {_AGAIN}")
    fields = {"dtype", "shape", "data_offsets"}
    others = {name: value for name, value in entry.items() if name not in fields}
    if not fields <= entry.keys():
        raise WeightsFormatError(
            f"{where}: its header entry has the fields {show(sorted(entry))}, not all of {sorted(fields)}. {_AGAIN}"
        )
    if not _is_json(others):
        raise WeightsFormatError(f"{where}: the field beside {sorted(fields)} is no JSON: {show(others)}. {_AGAIN}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise WeightsFormatError(
            f"{where}: unknown dtype {show(dtype_name)}; known are {', '.join(DTYPES)}."
            " Convert it to one of these, or update torch."
        )
    if not _is_sizes(shape):
        raise WeightsFormatError(f"{where}: shape {show(shape)} is not a list of sizes from 0 to 2**63 - 1. {_AGAIN}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsFormatError(
            f"{where}: data_offsets {show(offsets)} are not two integers with 0 <= begin <= end < 2**63. {_AGAIN}"
        )
    if dtype_name == "F4":  # torch counts pairs of values
        if not shape or shape[-1] % 2:
            raise WeightsFormatError(f"{where}: F4 needs an even last dimension, not shape {show(shape)}. {_AGAIN}")
        shape = [*shape[:-1], shape[-1] // 2]
    nbytes = _count(where, shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise WeightsFormatError(
            f"{where}: {dtype_name} of shape {show(entry['shape'])} takes {nbytes} bytes,"
            f" but data_offsets {offsets} hold {end - begin}. {_AGAIN}"
        )
    return TensorRecord(name, file, data_start + begin, nbytes, dtype, tuple(shape))


def _is_sizes(value: object) -> bool:
    # type() and not isinstance(): True is no size
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _INT64_MAX for item in value)


def _is_json(value: object, depth: int = 0) -> bool:
    """Whether the format's own parser would take a value: numbers are finite, and not nested beyond its limit."""
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < _DEEPEST and all(_is_json(item, depth + 1) for item in inner)


def _count(where: str, shape: list[int]) -> int:
    """Items in a shape. Stops at the first overflow: a product of many large sizes would never end."""
    items = strides = 1
    for axis, size in enumerate(shape):
        items *= size  # as the library multiplies, in 64 bits without a sign
        strides *= max(size, 1) if axis else 1  # as torch does, also where there are no items
        if items > 2 * _INT64_MAX + 1 or strides > _INT64_MAX:
            break
    if items > _INT64_MAX or strides > _INT64_MAX:
        raise WeightsFormatError(f"{where}: shape {show(shape)} overflows 64 bits. {_AGAIN}")
    return items


def _check_coverage(file: Path, records: list[TensorRecord], data_start: int, size: int) -> None:
    """The tensors must cover the rest of the file exactly: no hole, no overlap, nothing missing or left."""
    cursor, before = data_start, "the header"
    for record in records:
        if record.offset != cursor:
            what = "leaves a hole after" if record.offset > cursor else "overlaps"
            raise WeightsFormatError(
                f"{file}: tensor {show(record.name)} begins at byte {record.offset} and {what} {before},"
                f" which ends at byte {cursor}. {_AGAIN}"
            )
        cursor, before = record.end, f"tensor {show(record.name)}"
    if cursor > size:
        cut = next(record for record in records if record.end > size)
        raise WeightsFormatError(
            f"{file}: cut short: tensor {show(cut.name)} ends at byte {cut.end}, but the file has {size} of"
            f" {cursor} bytes. {_AGAIN}"
        )
    if cursor < size:
        raise WeightsFormatError(
            f"{file}: {size - cursor} bytes belong to no tensor: {before} ends at byte {cursor},"
            f" but the file has {size} bytes. {_AGAIN}"
        )
