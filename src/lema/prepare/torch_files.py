"""PyTorch checkpoints (`.bin`, `.pt`, sharded ones with their index) as a source, without running what is in them.

torch's zip archives are read for which names they hold and where in the file each tensor's bytes are.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError, WeightsError, WeightsFormatError
from ..machine.memory import format_bytes, free_ram
from ..storage.header import DTYPES, show
from ..storage.index import TensorRecord
from ..storage.pieces import PIECE_BYTES, read_pieces
from ..storage.weight_files import check_promises, read_shard_index

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts put the weights."""
_AGAIN = "Download it again."


@dataclass(frozen=True)
class _Strided:
    """How a tensor lies in its storage, in elements."""

    stride: tuple[int, ...]
    contiguous: bool


class TorchSource:
    """Tensors of PyTorch checkpoint files.

    Layout: each file is opened once with `torch.load(weights_only=True)` on the meta device, which reads names,
    shapes and the place of every storage and no tensor's bytes. Files of the form torch wrote before 1.6 do not
    say where their bytes are: those are held in memory whole, if there is room.

    Args:
        path: a checkpoint file, or an index named `*.index.json`.

    Raises:
        WeightsNotFoundError: a shard is missing.
        WeightsFormatError: a file is damaged, or the index contradicts the files.
        UnsupportedError: a file holds something else than tensors.
        WeightsError: an old file larger than the free memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files, promised = read_shard_index(path) if path.suffix == ".json" else ([path], {})
        self.tensors: dict[str, TensorRecord] = {}
        self.metadata: dict[str, str] = {}
        self.held_bytes = 0
        """Bytes of files that had to be read whole."""
        self._strided: dict[str, _Strided] = {}
        self._held: dict[str, torch.Tensor] = {}
        for file in self.files:
            self._add(file)
        check_promises(path, promised, self.tensors)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's pieces, read from its file without a mapping; one that is no plain run of bytes comes whole."""
        record = self.tensors[name]
        where = f"{record.file}: {show(name)}"
        if name in self._held:
            return iter(self._held[name].reshape(-1).split(PIECE_BYTES // record.dtype.itemsize))
        lies = self._strided[name]
        if lies.contiguous:
            return read_pieces(record.file, record.offset, record.nbytes, record.dtype, where)
        return self._gathered(record, lies, where)

    def close(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def _gathered(self, record: TensorRecord, lies: _Strided, where: str) -> Iterator[torch.Tensor]:
        extent = _extent(record.shape, lies.stride)
        nbytes = extent * record.dtype.itemsize
        parts = [p.clone() for p in read_pieces(record.file, record.offset, nbytes, record.dtype, where)]
        storage = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield torch.as_strided(storage, record.shape, lies.stride).reshape(-1)

    def _add(self, file: Path) -> None:
        located = _is_archive(file)
        if not located:
            self._check_room(file)
        for name, tensor in _state_dict(file, _load(file, located)).items():
            known = self.tensors.get(name)
            if known is not None:
                raise WeightsFormatError(
                    f"{self.path}: tensor {show(name)} is in {known.file.name} and in {file.name}. Remove one of them, "
                    "or save the model again."
                )
            self._add_tensor(file, name, tensor)

    def _check_room(self, file: Path) -> None:
        size, free = file.stat().st_size, free_ram()
        if size > free:
            raise WeightsError(
                f"{file}: is of the form torch wrote before version 1.6, which must be read whole: "
                f"{format_bytes(size)}, and {format_bytes(free)} of memory are free. Use a machine with more, or take "
                "safetensors files."
            )
        self.held_bytes += size

    def _add_tensor(self, file: Path, name: str, tensor: torch.Tensor) -> None:
        where = f"{file}: tensor {show(name)}"
        dtype, shape = tensor.dtype, tuple(tensor.shape)
        if dtype not in DTYPES.values() or tensor.layout is not torch.strided or tensor.is_quantized:
            raise UnsupportedError(f"{where} is {dtype}, {tensor.layout}: safetensors cannot hold it.")
        nbytes = math.prod(shape) * dtype.itemsize
        if tensor.device.type != "meta":
            self._held[name] = tensor.detach()
            self.tensors[name] = TensorRecord(name, file, 0, nbytes, dtype, shape)
            return
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None:
            raise UnsupportedError(
                f"{where}: torch {torch.__version__} does not say where in the file it is. Use torch 2.8 or newer."
            )
        offset = start + tensor.storage_offset() * dtype.itemsize
        end = offset + _extent(shape, tensor.stride()) * dtype.itemsize
        if end > start + tensor.untyped_storage().nbytes() or end > file.stat().st_size:
            raise WeightsFormatError(f"{where} reaches beyond its storage or the file. {_AGAIN}")
        self.tensors[name] = TensorRecord(name, file, offset, nbytes, dtype, shape)
        self._strided[name] = _Strided(tensor.stride(), tensor.is_contiguous())


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _is_archive(file: Path) -> bool:
    """Whether this is a zip archive whose members can be read in place; False for a pickle of the older form.

    Raises:
        WeightsFormatError: neither, cut short, or an archive that torch did not write.
    """
    with open(file, "rb") as stream:
        head = stream.read(4)
    if head[:2] == b"\x80\x02":
        return False
    if head != b"PK\x03\x04":
        raise WeightsFormatError(
            f"{file}: is no PyTorch checkpoint, it begins with {head!r}. {_AGAIN} (A Git LFS pointer, a web page?)"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            orders = [archive.read(m) for m in members if m.filename.endswith("/byteorder")]
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise WeightsFormatError(f"{file}: is damaged or cut short: {error}. {_AGAIN}") from error
    if packed := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
        raise UnsupportedError(f"{file}: {packed[0]} is compressed, which torch does not do. Unpack and save it again.")
    if any(order != b"little" for order in orders):
        raise UnsupportedError(f"{file}: was written on a big-endian machine. Convert it there.")
    return True


def _load(file: Path, located: bool) -> Any:
    """What is in a file; tensors on the meta device where their place in the file is known."""
    try:
        return torch.load(file, map_location="meta" if located else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+)", str(error))
        what = next(filter(None, culprit.groups()), "") if culprit else ""
        raise UnsupportedError(
            f"{file}: holds Python objects beside tensors{f' ({what})' if what else ''}, which loading would run as "
            "code. It was not loaded. Take safetensors files, or, if you trust its origin, load it yourself and save "
            "its state dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        line = str(error).strip().partition("\n")[0].partition(". This is an internal")[0]
        raise WeightsFormatError(
            f"{file}: is damaged or no checkpoint: {line or type(error).__name__}. {_AGAIN}"
        ) from error


def _state_dict(file: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """The tensors by name, from under a training script's wrapper if there is one."""
    if isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        loaded = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
    others = (
        [
            f"{show(name)}: {type(value).__name__}"
            for name, value in loaded.items()
            if not isinstance(value, torch.Tensor)
        ]
        if isinstance(loaded, Mapping)
        else [type(loaded).__name__]
    )
    if others:
        raise UnsupportedError(
            f"{file}: is not a dictionary of tensors; it holds {', '.join(others[:5])}. Save the model's state dict "
            "alone."
        )
    if not loaded:
        raise WeightsFormatError(f"{file}: holds no tensors.")
    return {str(name): tensor for name, tensor in loaded.items()}
