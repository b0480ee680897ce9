"""Which tensors go into which file of the merged model.

Names, types and sizes suffice; nothing is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..storage.codecs import Stored
from ..storage.layout import PAGE, align_up
from ..storage.plain_tensors import PlainTensor

INDEX = "model.safetensors.index.json"
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEADER_BYTES = 200  # of one tensor's entry in a header, about


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    tensors: dict[str, tuple[PlainTensor, torch.dtype]]
    """Where each comes from, and its type in the file."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors, and of the header with room to spare, in bytes."""
        return self.data_bytes + align_up(_HEADER_BYTES * (len(self.tensors) + 1), PAGE)

    @property
    def data_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(math.prod(tensor.shape) * dtype.itemsize for tensor, dtype in self.tensors.values())


def plan_shards(
    tensors: Mapping[str, PlainTensor],
    left_out: Collection[str] = (),
    dtype: torch.dtype | None = None,
    decoded: torch.dtype | None = None,
    single_file: bool = False,
    max_shard_size: int | None = None,
) -> list[Shard]:
    """The files of the merged model, named as transformers names them: as the base is cut, unless asked otherwise.

    Args:
        tensors: the base's, by name.
        left_out: tensors not to write: second copies of tied ones.
        dtype: of floating-point tensors; None: each keeps its own.
        decoded: of tensors that were codes, where `dtype` says nothing; None: what their format decodes to.
        max_shard_size: bytes of tensors a file may hold; a larger tensor gets a file of its own.
    """
    kept = {
        name: (tensor, wanted if wanted is not None and tensor.dtype in _CASTABLE else tensor.dtype)
        for name, tensor in tensors.items()
        if name not in left_out
        for wanted in [dtype or (decoded if isinstance(tensor, Stored) else None)]
    }
    groups: list[list[str]]
    if single_file:
        groups = [list(kept)]
    elif max_shard_size is not None:
        split = split_state_dict_into_shards_factory(
            kept,
            get_storage_size=lambda item: math.prod(item[0].shape) * item[1].itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        groups = list(split.filename_to_tensors.values())
    else:
        files: dict[Path, list[str]] = {}
        for name, (tensor, _) in kept.items():
            files.setdefault(_file_of(tensor), []).append(name)
        groups = [files[file] for file in sorted(files)]
    groups = [group for group in groups if group]
    total = len(groups)
    names = (
        ["model.safetensors"]
        if total == 1
        else [f"model-{k:05}-of-{total:05}.safetensors" for k in range(1, total + 1)]
    )
    return [Shard(name, {key: kept[key] for key in group}) for name, group in zip(names, groups, strict=True)]


def _file_of(tensor: PlainTensor) -> Path:
    return tensor.codec.runs[0].record.file if isinstance(tensor, Stored) else tensor.file


def index_of(shards: list[Shard]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in sorted(shard.tensors)},
    }
