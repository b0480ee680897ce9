"""Writing a safetensors file tensor by tensor, in any order, without holding it in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from ..errors import ShapeMismatchError, WeightsError, WeightsFormatError
from .atomic import name_aside, put_in_place
from .header import DTYPES, TensorRecord, show

__all__ = ["SafetensorsWriter", "plan_file"]

_DATA_ALIGNMENT = 4096  # bytes; lets direct reads begin at the first tensor
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """One safetensors file, declared first and filled tensor by tensor.

    Layout: tensors are ordered by item size, largest first, then by name, as the safetensors library does,
    so every tensor is aligned to its item size. Spaces pad the header until the data begins at a multiple
    of 4096 bytes. https://github.com/huggingface/safetensors#format

    Mechanics: the bytes go to a hidden temporary file beside the target. Leaving the `with` block without
    an error checks that every declared tensor was written, flushes to the disk and moves the file into
    place in one step; leaving it with an error removes the temporary file, and what was at the target stays.

    Args:
        path: the file to make; an existing one is replaced on success.
        tensors: (name, dtype, shape) of every tensor of the file; shapes in items.
        metadata: strings for the header's `__metadata__`; `{"format": "pt"}` if None, which transformers
            asks for.

    Raises:
        WeightsFormatError: a name twice, a reserved name, or a type the format cannot hold.
        WeightsError: the folder is missing or not writable, or its disk has too little free space.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Iterable[tuple[str, torch.dtype, Iterable[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        """The file that appears on success."""
        self._records, header = plan_file(self.path, tensors, {"format": "pt"} if metadata is None else metadata)
        self.total_bytes = len(header) + sum(record.nbytes for record in self._records.values())
        """Size of the whole file in bytes."""
        self._unwritten = dict.fromkeys(self._records)
        self._temporary = name_aside(self.path)
        _check_target(self.path, self.total_bytes)
        try:
            self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot be written here: {error.strerror}.") from error
        try:
            os.ftruncate(self._file, self.total_bytes)
            self._put(header, 0)
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its type and shape must be those declared.

        Raises:
            ShapeMismatchError: another shape than declared.
            WeightsError: not declared, written already, of another type, or the disk refused.
        """
        record = self._records.get(name)
        if record is not None and tuple(tensor.shape) != record.shape:
            raise ShapeMismatchError(
                f"{self.path}: tensor {show(name)} has shape {tuple(tensor.shape)}, declared {record.shape}."
            )
        self.write_parts(name, [tensor])

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write one tensor from pieces that follow each other in its row-major order, of any shape.

        Only one piece at a time is held, so a large tensor can be converted piece by piece.

        Raises:
            WeightsError: not declared, written already, of another type or length, or the disk refused.
        """
        where = f"{self.path}: tensor {show(name)}"
        record = self._records.get(name)
        if record is None:
            raise WeightsError(f"{where} was not declared, so the header has no place for it.")
        if name not in self._unwritten:
            raise WeightsError(f"{where} was written twice.")
        cursor = record.offset
        for part in parts:
            if part.dtype != record.dtype:
                raise WeightsError(f"{where} is {part.dtype}, declared {record.dtype}.")
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            if cursor + raw.nbytes > record.end:
                raise WeightsError(f"{where} has more than its declared {record.nbytes} bytes.")
            self._put(raw.data, cursor)
            cursor += raw.nbytes
        if cursor != record.end:
            raise WeightsError(f"{where} has {cursor - record.offset} bytes, fewer than its declared {record.nbytes}.")
        del self._unwritten[name]

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        if self._unwritten:
            names = ", ".join(map(show, list(self._unwritten)[:12]))
            raise WeightsError(
                f"{self.path}: {len(self._unwritten)} of {len(self._records)} declared tensors were never"
                f" written: {names}. The file was not made."
            )
        try:
            put_in_place(self._temporary, self.path)
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot be put in place: {error.strerror}.") from error

    def _discard(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise WeightsError(f"{self.path}: writing failed: {error.strerror}. Check the disk.") from error


def plan_file(
    path: Path, tensors: Iterable[tuple[str, torch.dtype, Iterable[int]]], metadata: Mapping[str, str]
) -> tuple[dict[str, TensorRecord], bytes]:
    """Where every tensor goes in a file, and the file's first bytes: the padded header with its length in front.

    Raises:
        WeightsFormatError: a name twice, a reserved name, or a type the format cannot hold.
    """
    tensors = list(tensors)
    for name, dtype, _ in tensors:
        if name == "__metadata__":
            raise WeightsFormatError(f"{path}: no tensor may be named __metadata__; the format reserves it.")
        if dtype not in _TYPE_NAMES:
            raise WeightsFormatError(f"{path}: tensor {show(name)}: safetensors cannot hold {dtype}.")
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    places: list[tuple[str, int, int, torch.dtype, tuple[int, ...]]] = []
    begin = 0
    for name, dtype, sizes in sorted(tensors, key=lambda item: (-item[1].itemsize, item[0])):
        if name in entries:
            raise WeightsFormatError(f"{path}: tensor {show(name)} was declared twice.")
        shape = tuple(sizes)
        nbytes = math.prod(shape) * dtype.itemsize
        stored = [*shape[:-1], shape[-1] * 2] if _TYPE_NAMES[dtype] == "F4" else [*shape]
        entries[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": stored,
            "data_offsets": [begin, begin + nbytes],
        }
        places.append((name, begin, nbytes, dtype, shape))
        begin += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    records = {
        name: TensorRecord(name, path, len(header) + begin, nbytes, dtype, shape)
        for name, begin, nbytes, dtype, shape in places
    }
    return records, header


def _check_target(path: Path, needed: int) -> None:
    if path.is_dir():
        raise WeightsError(f"{path}: is a directory. Give the name of the file to write.")
    if not path.parent.is_dir():
        raise WeightsError(f"{path}: its folder does not exist. Make {path.parent} first.")
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise WeightsError(
            f"{path}: needs {needed} bytes, and its disk has {free} free."
            " Free some space, write elsewhere, or choose a smaller dtype."
        )
