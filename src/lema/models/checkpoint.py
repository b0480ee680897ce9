"""Which file tensors fill which parameters of a transformers model.

The rules are transformers' own (`get_model_conversion_mapping`); here they are only followed by name and
shape. It knows names and placement; it reads no weights, except to compare two stored copies of a tied one.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ..errors import MissingTensorError, ShapeMismatchError, UnsupportedError
from ..storage.codecs import Stored
from ..storage.index import GlobalBinaryIndex, TensorRecord
from ..storage.layout import ParameterSource
from ..storage.placement import PlacedTensor, chunk, concatenate, stack
from .gguf import place_gguf

logger = logging.getLogger(__name__)

NOTHING_CODED: Mapping[str, Stored] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class CheckpointMap:
    """Sources of all parameters and persistent buffers, and which names are one tensor."""

    sources: dict[str, ParameterSource]
    tied: dict[str, str]
    """Name -> name it shares its tensor with."""
    placed: dict[str, PlacedTensor] = field(default_factory=dict)
    """Of which runs of which tensors each is made, those of codes taken as what they stand for."""
    coded: Mapping[str, Stored] = field(default_factory=dict)
    """Tensors that the files keep as codes, by the name they have in files without."""


def map_checkpoint(
    model: PreTrainedModel,
    expected: Mapping[str, torch.Tensor],
    gbi: GlobalBinaryIndex,
    dtype: torch.dtype,
    coded: Mapping[str, Stored] = NOTHING_CODED,
    left_out: Collection[str] = (),
) -> CheckpointMap:
    """Find every parameter's source.

    Args:
        model: the skeleton; its conversions and ties are asked for.
        expected: names and empty tensors of its state, before any LoRA.
        dtype: what floating parameters are computed in, unless transformers keeps one in float32.
        coded: tensors that the files keep as codes, by the name they have in files without.
        left_out: paths of modules that the skeleton lacks; their tensors are nobody's, and that is as it should be.

    Raises:
        MissingTensorError: parameters without a source; all are listed.
        ShapeMismatchError: stored shapes differ from the configuration's; all are listed.
        UnsupportedError: a conversion is more than placement.
    """
    if gbi.is_gguf:
        placed, unused = place_gguf(model.config, expected, gbi)
    else:
        placed, unused = place_parameters(model, expected, gbi, coded)
    tied = {a: b for a, b in _ties(model, placed, gbi).items() if a in expected and b in expected}
    for name, partner in tied.items():
        placed.setdefault(name, placed[partner])
    if missing := [name for name in expected if name not in placed]:
        raise MissingTensorError(_missing_message(gbi, missing, unused))
    wrong = [n for n, empty in expected.items() if placed[n].shape != tuple(empty.shape)]
    if wrong:
        lines = [f"  {n}: stored {list(placed[n].shape)}, configured {list(expected[n].shape)}" for n in wrong]
        raise ShapeMismatchError(
            f"{gbi.path} does not fit the model's configuration, {len(wrong)} tensors differ in shape:\n"
            + "\n".join(lines) + "\nUse the config.json that belongs to these weights."
        )  # fmt: skip
    unused = [name for name in unused if not _lies_in(name, left_out)]
    if unused:
        logger.info("%s: %d tensors are not used by %s: %s", gbi.path, len(unused), type(model).__name__, unused[:8])
    types = _DtypePlan(model, dtype)
    sources = {
        name: ParameterSource(name, tuple(empty.shape), types.of(name, empty), placed[name].codec)
        for name, empty in expected.items()
    }
    return CheckpointMap(sources, tied, {name: placed[name] for name in expected}, coded)


def _lies_in(stored: str, modules: Collection[str]) -> bool:
    """Whether a stored name is one of these modules' tensors; files may leave out the first part of a path, or more."""
    parts = {path.rpartition(".")[2] for path in modules}
    return bool(parts.intersection(stored.split(".")[:-1]))


class _DtypePlan:
    """Type of each parameter, as `from_pretrained(dtype=...)` decides it."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        plan = model._get_dtype_plan(dtype)
        self._pattern = build_glob_alternation(list(plan))[0] if plan else None

    def of(self, name: str, empty: torch.Tensor) -> torch.dtype:
        if self._pattern is not None and self._pattern.search(name):
            return torch.float32
        return empty.dtype if empty.dtype != self._dtype else self._dtype


def place_parameters(
    model: PreTrainedModel,
    expected: Mapping[str, torch.Tensor],
    gbi: GlobalBinaryIndex,
    coded: Mapping[str, Stored] = NOTHING_CODED,
) -> tuple[dict[str, PlacedTensor], list[str]]:
    """Every parameter as runs of the checkpoint's tensors, and names of tensors that belong to none."""
    tensors: dict[str, TensorRecord | Stored] = {name: gbi.record(name) for name in gbi.keys}
    for stored in coded.values():
        for name in stored.consumes:
            tensors.pop(name, None)
    tensors |= coded
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, state = model.base_model_prefix, dict(expected)
    placed: dict[str, PlacedTensor] = {}
    gathered: dict[str, tuple[WeightConverter, dict[str, list[TensorRecord | Stored]]]] = {}
    unused: list[str] = []
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name not in expected:
            unused.append(key)
        elif pattern is None:
            placed[name] = PlacedTensor.whole(tensors[key])
        else:
            _, records = gathered.setdefault(name, (by_pattern[pattern], {}))
            records.setdefault(pattern, []).append(tensors[key])
    for name, (converter, records) in gathered.items():
        placed.update(_convert(name, converter, records, expected))
    return placed, unused


def _convert(
    name: str,
    converter: WeightConverter,
    records: dict[str, list[TensorRecord | Stored]],
    expected: Mapping[str, torch.Tensor],
) -> dict[str, PlacedTensor]:
    """What transformers' conversion of these tensors would give, as placement."""
    collected: dict[str, list[PlacedTensor] | PlacedTensor] = {
        pattern: [PlacedTensor.whole(r) for r in group] for pattern, group in records.items()
    }
    targets = converter.target_patterns
    operation: Any
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            single = len(collected) == 1
            collected = {
                targets[0] if single else pattern: stack(_listed(group), operation.dim)
                for pattern, group in collected.items()
            }
        elif kind == "Concatenate":
            parts = [t for p in converter.source_patterns if p in collected for t in _listed(collected[p])]
            collected = {targets[0]: concatenate(parts, operation.dim)}
        elif kind == "Chunk" and len(collected) == 1 and operation.num_shards_attribute is None:
            (group,) = collected.values()
            parts = chunk(_listed(group)[0], len(targets), operation.dim)
            collected = dict(zip(targets, parts, strict=True))
        elif kind == "Transpose" and _is_in_order(operation, collected, expected.get(name)):
            collected = {targets[0]: next(iter(collected.values()))}
        else:
            found = [tensor for group in records.values() for tensor in group]
            files = sorted({record.file.name for tensor in found for record in _records(tensor)})
            raise UnsupportedError(
                f"parameter {name!r} is made from {', '.join(r.name for g in records.values() for r in g[:2])}... in "
                f"{', '.join(files)} by {kind}, which changes the order of its bytes and cannot be streamed. Load the "
                "model once with transformers and save it with `save_original_format=False`"
            )
    full = name.replace("*.", "0.")
    before, _, after = next(full.partition(target) for target in collected if target in full)
    return {before + target + after: _listed(group)[0] for target, group in collected.items()}


def _is_in_order(
    operation: Any, collected: Mapping[str, list[PlacedTensor] | PlacedTensor], wanted: torch.Tensor | None
) -> bool:
    """Whether a tensor is stored as it is computed with, which an operation that looks at shapes leaves as it is."""
    (stored, *others) = [tensor for group in collected.values() for tensor in _listed(group)]
    same = wanted is not None and stored.shape == tuple(wanted.shape)
    return bool(getattr(operation, "check_dims", False)) and not others and same


def _listed(group: list[PlacedTensor] | PlacedTensor) -> list[PlacedTensor]:
    return group if isinstance(group, list) else [group]


def _records(tensor: TensorRecord | Stored) -> list[TensorRecord]:
    return [tensor] if isinstance(tensor, TensorRecord) else [run.record for run in tensor.codec.runs]


def _ties(model: PreTrainedModel, placed: Mapping[str, PlacedTensor], gbi: GlobalBinaryIndex) -> dict[str, str]:
    tied: dict[str, str] = {}
    for target, source in copy.copy(model.all_tied_weights_keys).items():
        if target in placed and source in placed:
            if placed[target] == placed[source] or _equal(gbi, placed[target], placed[source]):
                tied[target] = source
            else:
                logger.warning(
                    "%s holds %s and %s with different values although the configuration ties them; they stay apart",
                    gbi.path, target, source,
                )  # fmt: skip
        elif source in placed:
            tied[target] = source
        elif target in placed:
            tied[source] = target
    return tied


def _equal(gbi: GlobalBinaryIndex, a: PlacedTensor, b: PlacedTensor) -> bool:
    if a.shape != b.shape or len(a.parts) != 1 or len(b.parts) != 1:
        return False
    if not all(isinstance(placed.parts[0].tensor, TensorRecord) for placed in (a, b)):
        return False
    left, right = gbi.view(a.parts[0].tensor.name), gbi.view(b.parts[0].tensor.name)
    if left.dtype != right.dtype:
        return False
    return all(torch.equal(x, y) for x, y in zip(left.split(4096), right.split(4096), strict=True))


def _missing_message(gbi: GlobalBinaryIndex, missing: list[str], unused: list[str]) -> str:
    lines = []
    for name in missing:
        close = difflib.get_close_matches(name, unused, n=1)
        lines.append(f"  {name}" + (f" (unused and similar: {close[0]})" if close else ""))
    return (
        f"{gbi.path} lacks {len(missing)} tensors of the model:\n" + "\n".join(lines)
        + "\nCheck that the weights belong to this config.json and that every shard is there."
    )  # fmt: skip
