"""The weight files of an output folder: which tensor goes where, and writing and reading back at those places."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.core_model_loading import dot_natural_key

from ..errors import WeightsError
from ..storage.atomic import flush
from ..storage.header import show
from ..storage.index import TensorRecord
from ..storage.pieces import read_pieces
from ..storage.writer import plan_file

INDEX = "model.safetensors.index.json"
Declared = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be: its first bytes, and every tensor's place."""

    path: Path
    header: bytes
    """Padded so that the data begins at a multiple of 4096 bytes."""
    records: Mapping[str, TensorRecord]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(record.nbytes for record in self.records.values())


def plan_output(
    folder: Path, tensors: Iterable[Declared], max_shard_size: int | None, metadata: Mapping[str, str]
) -> list[OutputFile]:
    """Files of at most `max_shard_size` bytes of tensors (None: one file); a layer stays in one file if it fits."""
    shards: list[list[Declared]] = []
    room = 0
    for group in _groups(tensors):
        size = sum(_nbytes(tensor) for tensor in group)
        whole = max_shard_size is None or size <= max_shard_size
        for part in [group] if whole else [[tensor] for tensor in group]:
            size = sum(_nbytes(tensor) for tensor in part)
            if not shards or (max_shard_size is not None and size > room):
                shards.append([])
                room = max_shard_size or 0
            shards[-1] += part
            room -= size
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = []
    for name, shard in zip(names, shards, strict=True):
        records, header = plan_file(folder / name, shard, {**metadata, "format": "pt"})
        files.append(OutputFile(folder / name, header, records))
    return files


def _groups(tensors: Iterable[Declared]) -> list[list[Declared]]:
    """Tensors in natural order, those of one layer (all up to the first number in the name) together."""
    groups: dict[str, list[Declared]] = {}
    for tensor in sorted(tensors, key=lambda item: dot_natural_key(item[0])):
        parts = tensor[0].split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        groups.setdefault(".".join(parts[: number + 1]), []).append(tensor)
    return list(groups.values())


def _nbytes(tensor: Declared) -> int:
    _, dtype, shape = tensor
    return torch.Size(shape).numel() * dtype.itemsize


def write_index(folder: Path, files: list[OutputFile]) -> None:
    """The index of a sharded checkpoint, as transformers writes it; nothing for a single file."""
    if len(files) < 2:
        return
    weight_map = {name: file.path.name for file in files for name in file.records}
    total = sum(record.nbytes for file in files for record in file.records.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class FileWriter:
    """Writes tensors of one file at their places. The file may be there already, from a run that was cut short."""

    def __init__(self, file: OutputFile) -> None:
        self.file = file
        try:
            self._descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(self._descriptor, file.nbytes)
                self._put(memoryview(file.header), 0)
            except BaseException:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise WeightsError(f"{file.path}: cannot be written: {error.strerror}.") from error

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> str:
        """Write one tensor from pieces in its output type; returns the digest of its bytes.

        Raises:
            WeightsError: the disk is full or refuses.
        """
        record = self.file.records[name]
        digest, cursor = new_digest(), record.offset
        for piece in pieces:
            if piece.dtype != record.dtype:
                raise WeightsError(f"{self.file.path}: {show(name)} comes as {piece.dtype}, announced {record.dtype}.")
            raw = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            digest.update(raw)
            self._put(raw, cursor)
            cursor += len(raw)
        if cursor != record.end:
            written = cursor - record.offset
            raise WeightsError(f"{self.file.path}: {show(name)} has {written} bytes, announced {record.nbytes}.")
        return digest.hexdigest()

    def sync(self) -> None:
        """Everything written is on the disk when this returns, and no longer takes room in the page cache."""
        try:
            flush(self.file.path)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise WeightsError(f"{self.file.path}: {error.strerror} on flushing to the disk.") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _put(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise WeightsError(
                f"{self.file.path}: writing failed: {error.strerror}. Free some space and run the same command again: "
                "what is written is kept."
            ) from error


def new_digest() -> hashlib.blake2b:
    """The running digest of a tensor's bytes."""
    return hashlib.blake2b(digest_size=16)


def stored_digest(record: TensorRecord) -> str:
    """The digest of a tensor's bytes as they are on the disk."""
    digest = new_digest()
    where = f"{record.file}: {show(record.name)}"
    for piece in read_pieces(record.file, record.offset, record.nbytes, record.dtype, where):
        digest.update(memoryview(piece.view(torch.uint8).numpy().data))
    return digest.hexdigest()
