"""A GGUF file as a model: its configuration, and which of its rows make which parameter.

Names, row orders and configurations are transformers' own answers: what it does to a tensor is found out on numbers of
rows in place of weights. It reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from ..errors import UnsupportedError, WeightsFormatError
from ..storage.codecs import Stored
from ..storage.codecs.gguf import GgufRecord, GgufRows
from ..storage.gguf_header import check_gguf, open_gguf, split_files
from ..storage.header import show
from ..storage.index import GlobalBinaryIndex
from ..storage.placement import Part, PlacedTensor

_ALWAYS_TIED = ("falcon", "bloom")


def config_in(source: Path) -> PreTrainedConfig:
    """The configuration in a GGUF file, of a split model in its first.

    Raises:
        UnsupportedError: an architecture that transformers cannot read from GGUF.
        WeightsError: no GGUF file, a damaged one, or part of a model is missing.
    """
    files = split_files(source)
    for file in files:
        check_gguf(file)
    first = files[0]
    try:
        config = AutoConfig.from_pretrained(first.parent, gguf_file=first.name, trust_remote_code=False)
    except (ValueError, KeyError, IndexError) as error:
        open_gguf(first)  # a damaged file says so itself
        raise UnsupportedError(
            f"{first}: transformers cannot read this model from GGUF: {error}"
            " Take the model's safetensors files instead."
        ) from error
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)
    if len(files) > 1 and config.model_type not in _ALWAYS_TIED:  # transformers looks for the head in one file only
        names = {tensor.name for file in files for tensor in open_gguf(file).tensors}
        config.tie_word_embeddings = "output.weight" not in names
    return config


def tokenizer_in(source: Path) -> Any:
    """The tokenizer in a GGUF file, of a split model in its first, with its chat template.

    Raises:
        WeightsFormatError: the file has none that transformers can read.
    """
    first = split_files(source)[0]
    check_gguf(first)
    try:
        return AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise WeightsFormatError(
            f"{first}: transformers cannot read the tokenizer in it: {type(error).__name__}: {error}. Give the "
            "model's own folder, to lema prepare with --config"
        ) from error


def place_gguf(
    config: PreTrainedConfig, expected: Mapping[str, torch.Tensor], gbi: GlobalBinaryIndex
) -> tuple[dict[str, PlacedTensor], list[str]]:
    """Every parameter as rows of a GGUF file's tensors, by transformers' name, and names of tensors of no parameter.

    Args:
        config: the model's.
        expected: names and empty tensors of the model's state, before any LoRA.

    Raises:
        UnsupportedError: transformers does more to a tensor than to order its rows, or leaves one out that matters.
    """
    architecture = gbi.metadata["architecture"]
    settings = load_gguf_checkpoint(gbi.files[0])["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = get_gguf_hf_weights_map(model, processor)
    parts: dict[str, list[GgufRecord]] = {}
    unused = []
    for key in gbi.keys:
        record = gbi.record(key)
        assert isinstance(record, GgufRecord)
        name = names.get(key) or names.get(key.rpartition(".")[0])  # fused experts are mapped without a suffix
        if name in expected:
            parts.setdefault(name, []).append(record)
        else:
            unused.append(key)
    if effective := [key for key in unused if not _neutral(key, gbi)]:
        raise UnsupportedError(
            f"{gbi.path}: transformers has no place for {len(effective)} tensors: "
            f"{', '.join(map(show, effective[:12]))}. Leaving them out would give another model; take the model's "
            "safetensors files instead."
        )
    placed = {name: _place(name, tuple(expected[name].shape), parts[name], processor, names) for name in parts}
    return placed, unused


def _neutral(name: str, gbi: GlobalBinaryIndex) -> bool:
    """Frequency factors of 1 change nothing."""
    return name == "rope_freqs.weight" and bool((gbi.view(name) == 1).all())


def _place(
    name: str, shape: tuple[int, ...], records: Sequence[GgufRecord], processor: Any, names: dict[str, str]
) -> PlacedTensor:
    """One parameter, of one tensor or several."""
    if any(len(record.shape) < 2 and record.dtype == torch.uint8 for record in records):
        raise _not_rows(records[0], name)
    heights = [_height(record) for record in records]
    starts = [sum(heights[:number]) for number in range(len(records))]
    try:
        plus = _made(name, [np.zeros_like(probe) for probe in _probes(records, starts)], records, processor, names)
        found = _made(name, _probes(records, starts), records, processor, names)
    except (ValueError, IndexError, KeyError) as error:
        raise _not_rows(records[0], name) from error
    if not np.isfinite(plus).all() or (plus != plus.flat[0]).any():
        raise _not_rows(records[0], name)
    offset, paired = float(plus.flat[0]), len(records[0].shape) > 1
    numbers = (found - offset).reshape(-1, 2 if paired else 1)
    rows = (numbers[:, 0] // numbers.shape[1]).astype(np.int64)
    whole = numbers[:, 0] == rows * numbers.shape[1]
    if not whole.all() or (paired and (numbers[:, 1] - numbers[:, 0] != 1).any()):
        raise _not_rows(records[0], name)
    width = records[0].values_shape[-1] if paired else 1
    if any(record.values_shape[-1:] != records[0].values_shape[-1:] for record in records[1:]):
        raise _not_rows(records[0], name)
    fits = prod(shape) == len(rows) * width and (not paired or shape[-1] == width)
    made = shape if fits else (len(rows), width)[: 2 if paired else 1]
    if len(records) == 1 and np.array_equal(np.sort(rows), np.arange(heights[0])):
        ordered = np.array_equal(rows, np.arange(len(rows)))
        if ordered and not offset and records[0].dtype != torch.uint8:
            return PlacedTensor(made, (Part(records[0], 0, 0, prod(made)),))
        order = None if ordered else tuple(rows.tolist())
        codec = GgufRows(records[0], 0, heights[0], order, offset)
        return PlacedTensor.whole(Stored(name, made, torch.float32, codec, (records[0].name,)))
    return PlacedTensor(made, tuple(_runs(rows, records, starts, width, offset)))


def _height(record: GgufRecord) -> int:
    """Rows of a tensor; of one of one dimension, its elements."""
    return prod(record.shape[:-1]) if len(record.shape) > 1 else prod(record.shape)


def _probes(records: Sequence[GgufRecord], starts: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """In place of each tensor the numbers of its rows, counted through all of them; two columns are told apart."""
    found = []
    for record, start in zip(records, starts, strict=True):
        width = 2 if len(record.shape) > 1 else 1
        numbers = np.arange(start * width, (start + _height(record)) * width, dtype=np.float64)
        found.append(numbers.reshape(*record.shape[:-1], 2) if width == 2 else numbers)
    return found


def _made(
    name: str, probes: list[np.ndarray[Any, Any]], records: Sequence[GgufRecord], processor: Any, names: dict[str, str]
) -> np.ndarray[Any, Any]:
    """What transformers makes of these in place of weights."""
    made: dict[str, Any] = {}  # where processors put what they assemble themselves
    with np.errstate(all="ignore"):
        for probe, record in zip(probes, records, strict=True):
            result = processor.process(
                weights=probe, name=record.name, tensor_key_mapping=names, parsed_parameters={"tensors": made}
            )
            if result.name is not None:
                made[name] = result.weights
    return np.asarray(made[name]).astype(np.float64)


def _runs(
    rows: np.ndarray[Any, Any], records: Sequence[GgufRecord], starts: Sequence[int], width: int, offset: float
) -> Iterator[Part]:
    """Rows that follow one another in a tensor, together."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for first, end in pairwise(cuts):
        start = int(rows[first])
        number = max(number for number, at in enumerate(starts) if at <= start)
        record, local = records[number], start - starts[number]
        codec = GgufRows(record, local, end - first, None, offset)
        name = f"{record.name}[{local}:{local + end - first}]"
        stored = Stored(name, (end - first, width), torch.float32, codec, (record.name,))
        yield Part(stored, 0, first * width, (end - first) * width)


def _not_rows(record: GgufRecord, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{record.file}: {show(record.name)} becomes {name} by more than an order of its rows, so it is not read in "
        "place. Make safetensors of it: lema prepare FILE OUTPUT"
    )
