"""What a checkpoint offers to be copied: tensors by name, given in small pieces; and safetensors as one.

What becomes of the pieces is up to `job`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..errors import WeightsError
from ..storage.header import show
from ..storage.index import GlobalBinaryIndex, TensorRecord
from ..storage.pieces import read_pieces


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor."""

    path: Path
    """What to name in messages."""
    files: list[Path]
    """All files with weights."""

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """By name, in the order in which they are best read. Offsets mean something to the source alone."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Strings to keep in the output's header."""

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's elements in row-major order, in its type, as one-dimensional tensors that follow each other.

        Raises:
            ReadError: the file ended early or the disk refused.
        """

    def close(self) -> None:
        """Let go of the files."""


class FileWatch:
    """Sizes and modification times of files, to notice that one changed while it was read."""

    def __init__(self, files: list[Path]) -> None:
        self.states = {str(file): _state(file) for file in files}
        """By path: bytes and nanoseconds."""

    def check(self) -> None:
        """Raise `WeightsError` if a file is another one now."""
        for file, (size, time) in self.states.items():
            now = _state(Path(file))
            if now != (size, time):
                raise WeightsError(
                    f"{file}: changed while it was read: {size} bytes before, {now[0]} now. Start again when nothing "
                    "writes to it"
                )


def _state(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror}. Put it back and start again.") from error
    return status.st_size, status.st_mtime_ns


class SafetensorsSource:
    """A safetensors checkpoint, single or sharded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = GlobalBinaryIndex(path)
        self.files = self._index.files
        self.tensors: dict[str, TensorRecord] = {name: self._index.record(name) for name in self._index.keys}
        self.metadata = self._index.metadata

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's pieces, read without a mapping."""
        record = self.tensors[name]
        return read_pieces(record.file, record.offset, record.nbytes, record.dtype, f"{record.file}: {show(name)}")

    def close(self) -> None:
        """Let go of the files."""
        self._index.close()
