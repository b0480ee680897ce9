"""Which tensors go into which file of the merged model.

Names, types and sizes suffice; nothing is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..storage.index import GlobalBinaryIndex, TensorRecord
from ..storage.layout import PAGE, align_up

INDEX = "model.safetensors.index.json"
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEADER_BYTES = 200  # of one tensor's entry in a header, about


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    tensors: dict[str, tuple[TensorRecord, torch.dtype]]
    """Where each comes from, and its type in the file."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors, and of the header with room to spare, in bytes."""
        return self.data_bytes + align_up(_HEADER_BYTES * (len(self.tensors) + 1), PAGE)

    @property
    def data_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(math.prod(record.shape) * dtype.itemsize for record, dtype in self.tensors.values())


def plan_shards(
    gbi: GlobalBinaryIndex,
    left_out: Collection[str] = (),
    dtype: torch.dtype | None = None,
    single_file: bool = False,
    max_shard_size: int | None = None,
) -> list[Shard]:
    """The files of the merged model, named as transformers names them: as the base is cut, unless asked otherwise.

    Args:
        left_out: tensors not to write: second copies of tied ones.
        dtype: of floating-point tensors; None: each keeps its own.
        max_shard_size: bytes of tensors a file may hold; a larger tensor gets a file of its own.
    """
    kept = {
        name: (record, dtype if dtype is not None and record.dtype in _CASTABLE else record.dtype)
        for name in gbi.keys
        if name not in left_out
        for record in [gbi.record(name)]
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
        groups = [[name for name, (record, _) in kept.items() if record.file == file] for file in gbi.files]
    groups = [group for group in groups if group]
    total = len(groups)
    names = (
        ["model.safetensors"]
        if total == 1
        else [f"model-{k:05}-of-{total:05}.safetensors" for k in range(1, total + 1)]
    )
    return [Shard(name, {key: kept[key] for key in group}) for name, group in zip(names, groups, strict=True)]


def index_of(shards: list[Shard]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in sorted(shard.tensors)},
    }
