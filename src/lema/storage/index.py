"""The global binary index: every tensor of a checkpoint by name, in constant time.

What is streamed is read by `reader`, from the records handed out here.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import mmap
import os
import sys
from collections.abc import Iterable
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from types import TracebackType

import torch

from ..errors import MissingTensorError, ReadError, WeightsError, WeightsFormatError
from .gguf_header import SUFFIX, read_gguf_header
from .header import Header, TensorRecord, open_weights, read_header, show
from .pieces import read_elements
from .weight_files import check_promises, locate_weights

__all__ = ["GlobalBinaryIndex", "TensorRecord"]

# The mmap module names it from Python 3.13 on.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class GlobalBinaryIndex:
    """Index over a `.safetensors` file, a directory with one, a sharded checkpoint, or a `.gguf` file, split or whole.

    Layout: opening reads 8 bytes and the header of every file, checks them in full, and keeps one
    `TensorRecord` a tensor. Which files of a directory are meant is transformers' order, see `locate_weights`.
    The tensors served are those the files hold; an index that contradicts them is refused. The values are
    little-endian, as in the format.

    Mechanics: `view` maps a file on first use, privately and copy-on-write, so a write to a view is seen by
    later views of this index and never reaches the file. The mapping is never closed by hand: torch keeps
    the mapping object alive but no lock on it, so closing it would pull the memory from under live views.
    We drop our reference, and it goes with the last view. `load_tensors` reads without a mapping.

    Args:
        path: a safetensors file (whatever its suffix), a directory, an index named `*.json`, or one of a model's
            `.gguf` files.

    Raises:
        WeightsNotFoundError: nothing there, or a shard is missing.
        WeightsFormatError: a header or index is damaged or contradicts the files.
        WeightsError: the directory is ambiguous, or a file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        """The path given."""
        files, weight_map = locate_weights(self.path)
        self._headers: dict[Path, Header] = {file: _header_of(file) for file in files}
        self._records: dict[str, TensorRecord] = {}
        for header in self._headers.values():
            for record in header.records:
                known = self._records.setdefault(record.name, record)
                if known is not record:
                    raise WeightsFormatError(
                        f"{self.path}: tensor {show(record.name)} is in {known.file.name} and in"
                        f" {record.file.name}. Remove one of them, or save the model again."
                    )
        check_promises(self.path, weight_map, self._records)
        self._mappings: dict[Path, mmap.mmap] = {}
        self._closed = False

    @property
    def keys(self) -> list[str]:
        """Names of all tensors, file by file, in the order of their bytes."""
        return list(self._open_records())

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        self._open_records()
        return list(self._headers)

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of the first file; empty if it has none."""
        self._open_records()
        return dict(next(iter(self._headers.values())).metadata)

    @property
    def is_gguf(self) -> bool:
        """Whether the names are llama.cpp's, and the types gguf's."""
        return self.metadata.get("format") == "gguf"

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(record.nbytes for record in self._open_records().values())

    def __contains__(self, name: object) -> bool:
        return name in self._open_records()

    def __len__(self) -> int:
        return len(self._open_records())

    def record(self, name: str) -> TensorRecord:
        """Where a tensor is. Constant time; does not touch the disk.

        Raises:
            MissingTensorError: no such tensor; similar names are suggested.
            WeightsError: the index is closed.
        """
        return self._find((name,))[0]

    def view(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file: no bytes are copied until touched.

        Calls with the same name give the same memory. Only a tensor whose offset in the file is not
        divisible by its item size comes as a copy, since torch needs aligned data.

        Raises:
            MissingTensorError: no such tensor.
            WeightsError: closed, or the file changed since it was opened.
            ReadError: the file cannot be mapped.
        """
        record = self.record(name)
        self._check_file(record.file)
        if record.offset % record.dtype.itemsize:
            return _read(record)
        if record.nbytes == 0:
            return torch.empty(record.shape, dtype=record.dtype)
        count = record.nbytes // record.dtype.itemsize
        flat = torch.frombuffer(self._mapping(record.file), dtype=record.dtype, count=count, offset=record.offset)
        return flat.view(record.shape)

    def load_tensors(self, names: Iterable[str], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Read tensors into memory of their own, in the file's types, in the order of `names`.

        Files are read in the order of their bytes, and each tensor moves to `device` before the next is
        read, so the host holds one at a time when the device is another.

        Raises:
            MissingTensorError: lists all names that are not there, before anything is read.
            WeightsError: closed, or a file changed since it was opened.
            ReadError: reading failed or ended early.
        """
        records = self._find(names)
        loaded: dict[str, torch.Tensor] = {}
        for file, group in groupby(sorted(records, key=lambda r: (r.file, r.offset)), key=lambda r: r.file):
            self._check_file(file)
            with open_weights(file) as stream:
                loaded |= {r.name: _read(r, stream.fileno()).to(device) for r in group}
        return {record.name: loaded[record.name] for record in records}

    def advise_random(self, name: str) -> None:
        """Tell the system that this tensor's mapped bytes are touched at random, so it reads no further.

        Does nothing where the system has no `madvise`.

        Raises:
            MissingTensorError: no such tensor.
            WeightsError: closed, or the file changed since it was opened.
            ReadError: the file cannot be mapped.
        """
        self._advise(name, "MADV_RANDOM")

    def evict(self, name: str) -> None:
        """Take this tensor's mapped pages out of the process; whoever reads them again has them read from the file.

        Does nothing where the system has no `madvise`. Raises as `advise_random` does.
        """
        self._advise(name, "MADV_DONTNEED")

    def _advise(self, name: str, advice: str) -> None:
        record = self.record(name)
        self._check_file(record.file)
        if record.nbytes and hasattr(mmap, advice):
            start = record.offset - record.offset % mmap.PAGESIZE
            self._mapping(record.file).madvise(getattr(mmap, advice), start, record.end - start)

    def check_unchanged(self) -> None:
        """Compare size and modification time of every file with those found on opening.

        Raises:
            WeightsError: names the file and what changed; or the index is closed.
        """
        self._open_records()
        for file in self._headers:
            self._check_file(file)

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """What identifies the weights, JSON-ready, by file name: size, hash of the header, hash of sampled blocks.

        Of each file 256 blocks of 16 KiB are read, evenly spread, the first and the last among them: about 4 MiB a
        file however large it is. Another model, another training of it, a truncated or half-written file show.
        A file of the same size and header whose bytes differ only between the blocks does not; where that must
        be seen, hash the file whole.

        Raises:
            WeightsError: closed, or a file changed since it was opened.
            ReadError: reading failed.
        """
        self.check_unchanged()
        return {file.name: _fingerprint(file, header) for file, header in self._headers.items()}

    def close(self) -> None:
        """Let go of the files. Views handed out stay valid; every other use of the index now raises."""
        self._closed = True
        self._mappings.clear()

    def __enter__(self) -> GlobalBinaryIndex:
        self._open_records()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} tensors in {len(self._headers)} files"
        return f"{type(self).__name__}({str(self.path)!r}, {state})"

    def _open_records(self) -> dict[str, TensorRecord]:
        if self._closed:
            raise WeightsError(f"{self.path}: this index was closed. Open a new GlobalBinaryIndex.")
        return self._records

    def _find(self, names: Iterable[str]) -> list[TensorRecord]:
        records = self._open_records()
        names = list(dict.fromkeys(names))
        if missing := [name for name in names if name not in records]:
            similar = difflib.get_close_matches(str(missing[0]), records)
            hint = f"Similar to the first: {', '.join(map(show, similar))}" if similar else "Nothing is similar"
            raise MissingTensorError(
                f"{self.path}: no tensor {', '.join(map(show, missing))} among its {len(records)}."
                f" {hint}. Check that the weights belong to this model; `.keys` lists all names."
            )
        return [records[name] for name in names]

    def _check_file(self, file: Path) -> None:
        """One stat. A file cut short under a mapping kills the process with SIGBUS when touched."""
        header = self._headers[file]
        try:
            status = os.stat(file)
        except OSError as error:
            raise WeightsError(
                f"{file}: gone since it was opened: {error.strerror}. Put it back and open the weights again."
            ) from error
        changes = []
        if status.st_size != header.size:
            changes.append(f"size from {header.size} to {status.st_size} bytes")
        if status.st_mtime_ns != header.mtime_ns:
            changes.append(f"modification time from {header.mtime_ns} to {status.st_mtime_ns} ns")
        if changes:
            raise WeightsError(f"{file}: changed since it was opened: {', '.join(changes)}. Open the weights again.")

    def _mapping(self, file: Path) -> mmap.mmap:
        mapping = self._mappings.get(file)
        if mapping is None:
            try:
                with open(file, "rb") as stream:
                    mapping = _map_copy_on_write(stream, self._headers[file].size)
            except (OSError, ValueError) as error:  # ValueError: shorter than it was
                raise ReadError(
                    f"{file}: cannot be mapped: {error}. Use load_tensors(), which needs no mapping."
                ) from error
        return self._mappings.setdefault(file, mapping)  # two threads agree on one


def _header_of(file: Path) -> Header:
    return read_gguf_header(file) if file.suffix == SUFFIX else read_header(file)


def _fingerprint(file: Path, header: Header, blocks: int = 256, block_bytes: int = 1 << 14) -> dict[str, int | str]:
    start = min((record.offset for record in header.records), default=header.size)
    last = max(header.size - block_bytes, start)
    offsets = sorted({start + (last - start) * number // (blocks - 1) for number in range(blocks)})
    samples = hashlib.blake2b(digest_size=16)
    try:
        with open_weights(file) as stream:
            head = hashlib.blake2b(stream.read(start), digest_size=16)
            for offset in offsets:
                stream.seek(offset)
                samples.update(stream.read(block_bytes))
    except OSError as error:
        raise ReadError(f"{file}: reading samples of it failed: {error.strerror}. Check the disk.") from error
    return {"bytes": header.size, "header": head.hexdigest(), "samples": samples.hexdigest()}


def _read(record: TensorRecord, descriptor: int | None = None) -> torch.Tensor:
    return read_elements(record, 0, math.prod(record.shape), descriptor).view(record.shape)


def _map_copy_on_write(stream: BufferedReader, size: int) -> mmap.mmap:
    # ACCESS_COPY, and no memory reserved for the copies: otherwise Linux refuses files larger than its RAM.
    return mmap.mmap(
        stream.fileno(),
        size,
        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )
