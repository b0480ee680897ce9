"""A checkpoint's tensors as it would have them without codes: by name, in shape and type, read by the run.

This is how models of codes are merged, converted and compared; the layers of a running step are decoded by `views`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch

from .codecs.base import Stored
from .header import TensorRecord
from .index import GlobalBinaryIndex
from .layout import ParameterSource
from .pieces import PIECE_BYTES, read_elements
from .views import materialize

_KEPT_BYTES = 64 << 20
PlainTensor = TensorRecord | Stored
"""A stored tensor that holds values, or one that is kept as codes."""


class PlainTensors:
    """The tensors of an index, those that are kept as codes in place of what they are kept in.

    Mechanics: a tensor of values is read where it is asked for. One of codes is decoded whole on first use, and kept
    with a few small ones before it, so that runs of it in their order, or of a few experts by turns, cost one decoding.

    Args:
        gbi: the index.
        coded: what formats found in it, by name.
    """

    def __init__(self, gbi: GlobalBinaryIndex, coded: Mapping[str, Stored] = MappingProxyType({})) -> None:
        self._gbi = gbi
        self.coded = coded
        """Tensors that are kept as codes."""
        consumed = {part for stored in coded.values() for part in stored.consumes}
        self.tensors: dict[str, PlainTensor] = {
            **{name: gbi.record(name) for name in gbi.keys if name not in consumed and name not in coded},
            **coded,
        }
        """By name."""
        self._decoded: dict[str, torch.Tensor] = {}

    def read(self, tensor: PlainTensor, start: int, count: int) -> torch.Tensor:
        """Elements in row-major order: `[count]`, of the tensor's type; not to be written.

        Raises:
            ReadError: it could not be read that far. WeightsFormatError: its codes are damaged.
        """
        if isinstance(tensor, TensorRecord):
            return read_elements(tensor, start, count)
        if tensor.name not in self._decoded:
            while self._decoded and sum(t.nbytes for t in self._decoded.values()) + nbytes_of(tensor) > _KEPT_BYTES:
                del self._decoded[next(iter(self._decoded))]
            source = ParameterSource(tensor.name, tensor.shape, tensor.dtype, tensor.codec)
            self._decoded[tensor.name] = materialize(self._gbi, source).view(-1)
        return self._decoded[tensor.name][start : start + count]

    def pieces(self, tensor: PlainTensor) -> Iterator[torch.Tensor]:
        """All elements as one-dimensional tensors that follow each other."""
        step = PIECE_BYTES // tensor.dtype.itemsize
        count = math.prod(tensor.shape)
        for start in range(0, count, step):
            yield self.read(tensor, start, min(step, count - start))


def nbytes_of(tensor: PlainTensor) -> int:
    """Of its values, in the type they are decoded to."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
