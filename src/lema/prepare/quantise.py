"""A checkpoint seen as its quantised self: tensors of codes in place of some of its own, made when they are asked for.

It knows which tensors become codes and in which format; it writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, WeightsError
from ..models.weight_kinds import WeightKind
from ..storage.codecs.formats import find_stored
from ..storage.header import TensorRecord, show
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource
from ..storage.views import materialize
from .encoders import ENCODERS, Encoder
from .fit import Fit
from .source import Source

_BOUND = {"nf4": 0.2, "int8": 0.005, "fp8": 0.04}
"""Of a tensor's largest magnitude: more than rounding to a format's codes can be off."""


def encoder_of(name: str) -> Encoder:
    """The format of this name; `ConfigError` for another one."""
    if name not in ENCODERS:
        raise ConfigError(f"quantize={name!r} is none of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def kinds_of(also: Iterable[str]) -> frozenset[WeightKind]:
    """What is quantised: layers' matrices, and what else is named; `ConfigError` for what has no name here."""
    extra = {kind.value: kind for kind in WeightKind if kind is not WeightKind.LAYER}
    if unknown := [name for name in also if name not in extra]:
        raise ConfigError(f"quantize_also={unknown[0]!r} is none of {', '.join(extra)}")
    return frozenset({WeightKind.LAYER, *(extra[name] for name in also)})


class QuantisedSource:
    """A source whose matrices of some kinds are codes.

    Args:
        source: with plain weights.
        fit: says what they are for.
        types: of its tensors in the output; what codes are decoded to.
        encoder: the format.
        kinds: what is quantised.

    Raises:
        ConfigError: the model has nothing to quantise.
    """

    def __init__(
        self,
        source: Source,
        fit: Fit,
        types: Mapping[str, torch.dtype],
        encoder: Encoder,
        kinds: frozenset[WeightKind],
    ) -> None:
        self.path, self.files, self.metadata = source.path, source.files, source.metadata
        self._source, self._types, self._encoder = source, types, encoder
        self.coded = [name for name in types if fit.kinds.get(name) in kinds and name not in fit.in_float32]
        """Tensors of the source that become codes."""
        if not self.coded:
            wanted = ", ".join(sorted(kind.value for kind in kinds))
            raise ConfigError(f"{source.path}: has no matrices of its own that could be quantised ({wanted})")
        self._made_of: dict[str, str] = {}
        self.tensors: dict[str, TensorRecord] = {}
        coded = set(self.coded)
        for name in types:
            record = source.tensors[name]
            if name not in coded:
                self.tensors[name] = record
                continue
            for part, dtype, shape in encoder.declared(name, record.shape):
                nbytes = math.prod(shape) * dtype.itemsize
                self.tensors[part] = TensorRecord(part, record.file, 0, nbytes, dtype, shape)
                self._made_of[part] = name
        self.types = {
            name: record.dtype if name in self._made_of else types[name] for name, record in self.tensors.items()
        }
        """Of the output's tensors."""
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor of the source as it is, or one of codes; those of one weight follow each other in the output."""
        made_of = self._made_of.get(name)
        if made_of is None:
            yield from self._source.pieces(name)
            return
        if self._last[0] != made_of:
            self._last = ("", {})  # before the next: one tensor's codes at a time
            record = self._source.tensors[made_of]
            parts = self._encoder.encode(made_of, record.shape, self._types[made_of], self._source.pieces(made_of))
            self._last = (made_of, parts)
        yield self._last[1][name].reshape(-1)

    def close(self) -> None:
        """Let go of the files."""
        self._source.close()

    def settings(self, linear: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` of config.json.

        Args:
            linear: paths of the model's linear modules.
            dtype: what codes are decoded to.
        """
        coded = {name.removesuffix(".weight") for name in self.coded}
        return self._encoder.settings(dtype, [path for path in linear if path not in coded])

    def errors(self, output: Path, progress: Callable[[str, int, int], None]) -> dict[str, float]:
        """How far the written codes are from the source, by tensor: norm of the difference over the tensor's norm.

        Raises:
            WeightsError: further than rounding to the format's codes can be, or not found as codes of it.
        """
        errors = {}
        total = sum(self._source.tensors[name].nbytes for name in self.coded)
        done = 0
        with GlobalBinaryIndex(output) as index:
            found = find_stored({name: index.record(name) for name in index.keys}, None)
            for name in self.coded:
                if name not in found:
                    raise WeightsError(f"{output}: {show(name)} was written and is not found as codes. Start again.")
                stored = found[name]
                decoded = materialize(index, ParameterSource(name, stored.shape, torch.float32, stored.codec))
                errors[name] = self._compared(name, decoded.view(-1), output)
                done += self._source.tensors[name].nbytes
                progress("comparing with the source", done, total)
        return errors

    def _compared(self, name: str, decoded: torch.Tensor, output: Path) -> float:
        cursor, off, size, worst, largest = 0, 0.0, 0.0, 0.0, 0.0
        for piece in self._source.pieces(name):
            values = piece.to(torch.float32)
            difference = decoded[cursor : cursor + values.numel()] - values
            off += float(difference.double().square().sum())
            size += float(values.double().square().sum())
            worst = max(worst, float(difference.abs().max()))
            largest = max(largest, float(values.abs().max()))
            cursor += values.numel()
        if not worst <= _BOUND[self._encoder.name] * largest:
            raise WeightsError(
                f"{output}: {show(name)}: a value is {worst:.3g} off, with none above {largest:.3g} in "
                f"{self._source.path}: more than {self._encoder.name} rounds. Look for values there that are no numbers"
            )
        return math.sqrt(off / size) if size else 0.0
