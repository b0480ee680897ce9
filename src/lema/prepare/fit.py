"""Whether tensors make up the model their configuration describes, which of them are one tensor, which stay float32.

It asks transformers' skeleton and LEMA's own placement, by name and shape; of weights it reads only two copies of
what the configuration ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError

from ..errors import ConfigError, LemaError
from ..models.checkpoint import map_checkpoint, place_parameters
from ..models.quantised import refuse_codes, refuse_quantised
from ..models.registry import get_adapter
from ..models.transformers_adapter import TransformersAdapter
from ..models.weight_kinds import WeightKind, linear_modules, weight_kinds
from ..storage.index import GlobalBinaryIndex, TensorRecord
from ..storage.layout import ParameterSource
from .source import Source


@dataclass(frozen=True)
class Fit:
    """What the model's configuration says of its stored tensors."""

    copies: tuple[str, ...] = ()
    """Stored tensors that repeat another one, to which the configuration ties them: not written again."""
    contradicted: tuple[str, ...] = ()
    """Stored tensors that the configuration ties to others with different values: they are kept, and it is wrong."""
    in_float32: tuple[str, ...] = ()
    """Stored tensors that transformers computes in float32 whatever the type of the model."""
    note: str = ""
    """Why nothing was checked, if so."""
    kinds: Mapping[str, WeightKind] = field(default_factory=dict)
    """What stored tensors are for that are matrices, each whole in its parameter."""
    linear: tuple[str, ...] = ()
    """Paths of the model's linear modules."""


@dataclass(frozen=True)
class _Names:
    """A source as `map_checkpoint` asks an index: it wants names, shapes and types, no values."""

    path: Path
    records: Mapping[str, TensorRecord]
    is_gguf: bool = False
    """A GGUF file as a source gives its tensors under transformers' names already."""

    @property
    def keys(self) -> list[str]:
        return list(self.records)

    def record(self, name: str) -> TensorRecord:
        return self.records[name]


def check_fit(values: Mapping[str, Any], source: Source, dtype: torch.dtype) -> Fit:
    """Compare a source with the model of a configuration.

    Args:
        values: config.json.
        source: where the tensors are.
        dtype: what the model is going to be computed in.

    Raises:
        UnsupportedError: quantised, no causal language model, or one whose files cannot be streamed.
        MissingTensorError, ShapeMismatchError: the tensors are not those of the model; all are listed.
        ConfigError: the configuration describes no model.
    """
    refuse_quantised(values, source.path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{source.path.parent}: config.json has no model_type, so nothing says what model this is")
    try:
        adapter = get_adapter(model_type, values)
        if not isinstance(adapter, TransformersAdapter):
            return Fit(note=f"the adapter registered for {model_type} knows its own tensors; they were not checked")
        adapter.configure(dtype)
        model = adapter.model
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, LemaError):
            raise
        raise ConfigError(
            f"the config.json for {source.path} describes no model: {type(error).__name__}: {error}"
        ) from error
    expected = dict(model.state_dict())
    index = cast(GlobalBinaryIndex, _Names(source.path, source.tensors))
    placed, _ = place_parameters(model, expected, index)
    copies: list[str] = []
    contradicted: list[str] = []
    for name, partner in model.all_tied_weights_keys.items():
        if name in placed and partner in placed:
            stored, other = (placed[n].parts[0].tensor.name for n in (name, partner))
            if stored != other:
                (copies if _equal(source, stored, other) else contradicted).append(stored)
    left_out = {*copies, *contradicted}
    once = {name: record for name, record in source.tensors.items() if name not in left_out}
    sources = map_checkpoint(model, expected, cast(GlobalBinaryIndex, _Names(source.path, once)), dtype).sources
    refuse_codes(sources.values(), source.path)
    in_float32 = {
        piece.record.name for s in sources.values() if s.dtype == torch.float32 != dtype for piece in s.pieces
    }
    kinds = _stored_kinds(weight_kinds(model), sources)
    linear = tuple(linear_modules(model))
    return Fit(tuple(copies), tuple(contradicted), tuple(sorted(in_float32)), kinds=kinds, linear=linear)


def _stored_kinds(kinds: Mapping[str, WeightKind], sources: Mapping[str, ParameterSource]) -> dict[str, WeightKind]:
    found = {}
    for name, kind in kinds.items():
        for piece in sources[name].pieces:
            record = piece.record
            if len(record.shape) >= 2 and (piece.source, piece.count) == (0, math.prod(record.shape)):
                found[record.name] = kind
    return found


def untied(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the flag that ties head and embedding switched off, wherever it is."""
    changed = {**values, "tie_word_embeddings": False}
    for key, part in changed.items():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            changed[key] = {**part, "tie_word_embeddings": False}
    return changed


def _equal(source: Source, a: str, b: str) -> bool:
    """Whether two stored tensors are the same, bit for bit; both are read in pieces."""
    one, two = source.tensors[a], source.tensors[b]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    pairs = zip(source.pieces(a), source.pieces(b), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)
