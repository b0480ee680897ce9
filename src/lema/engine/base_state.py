"""What `state_dict()` of a model says of weights that are streamed: they are in the files, and are taken from there.

It knows which file tensors make a parameter; it knows nothing of slots or of who asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models.transformers_adapter import TransformersAdapter
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource
from ..storage.views import materialize
from ..streaming.weight_store import WeightStore


def state_from_files(memory: WeightStore) -> dict[nn.Module, Callable[..., None]]:
    """For each module of the model a `_save_to_state_dict` that has its base weights as the files have them; none for
    an adapter of one's own, whose sources are not known by module.

    A weight is a view of the mapped file, in the file's type, and takes no memory until it is read. One that is made of
    several tensors (separate experts) or of codes is put together when it is asked for, and takes its size.
    """
    if not isinstance(memory.adapter, TransformersAdapter):
        return {}
    by_module: dict[nn.Module, dict[str, ParameterSource]] = {}
    for module, leaf, source in memory.adapter.placed_sources(memory.gbi):
        by_module.setdefault(module, {})[leaf] = source
    return {module: functools.partial(_save, module, memory.gbi, sources) for module, sources in by_module.items()}


def _save(
    module: nn.Module, gbi: GlobalBinaryIndex, sources: dict[str, ParameterSource],
    destination: dict[str, Any], prefix: str, keep_vars: bool,
) -> None:  # fmt: skip
    type(module)._save_to_state_dict(module, destination, prefix, keep_vars)
    for leaf, source in sources.items():
        if prefix + leaf in destination:
            destination[prefix + leaf] = _stored(gbi, source)


def _stored(gbi: GlobalBinaryIndex, source: ParameterSource) -> torch.Tensor:
    if len(source.pieces) != 1:
        return materialize(gbi, source)
    piece = source.pieces[0]
    stored = gbi.view(piece.record.name).reshape(-1)
    return stored[piece.source : piece.source + piece.count].view(source.shape)
