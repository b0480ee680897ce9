"""What a file stores for a parameter, and how values come of it: the seam that quantised formats enter by.

A codec knows stored tensors and arithmetic on them; a format knows which codecs a checkpoint takes. Files, slots and
the moment of decoding are their callers' business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..header import TensorRecord


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring elements of one stored tensor: the index of the first, and how many."""

    record: TensorRecord
    source: int
    count: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of elements copied from a file tensor into a parameter.

    Offsets and `count` are in elements, so that a cast on the way changes nothing here.
    """

    record: TensorRecord
    source: int
    target: int
    count: int


class Codec(ABC):
    """Stored tensors, one or several, that make one parameter; their elements need not be the parameter's.

    Two codecs are equal if they make the same of the same tensors.
    """

    @property
    @abstractmethod
    def runs(self) -> tuple[Run, ...]:
        """What has to be there to decode. Stored bytes travel over every tier as they are."""

    @abstractmethod
    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Make the parameter, without a graph and in the order of the calling thread's stream.

        Args:
            stored: the elements of `runs` in their order, each `[count]` of its file's type; not to be written.
            out: the parameter's own shape and type, contiguous; every element is to be written.
        """

    def check(self, stored: Sequence[torch.Tensor]) -> None:  # noqa: B027 (most have nothing to look for)
        """Look at stored values once, before the first decoding: whether they can be what the format says.

        May wait for a device, as it is not called in the steps that follow.

        Raises:
            WeightsFormatError: names the stored tensor and what is wrong in it.
        """

    def is_identity(self, dtype: torch.dtype, numel: int) -> bool:
        """Whether a view of the stored bytes is the parameter of this type and size."""
        return False


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that a format keeps as codes, under the name and in the shape it has in a checkpoint without codes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What the format's own library decodes it to; computing may take another."""
    codec: Codec
    consumes: tuple[str, ...]
    """Names of every stored tensor that belongs to it, those the codec has no use for among them."""


class Format(ABC):
    """How a family of checkpoints keeps tensors as codes."""

    name: str
    """As messages say it."""
    methods: frozenset[str] = frozenset()
    """What `quant_method` in config.json says for it."""
    experts_only = False
    """Whether it keeps nothing but experts as codes."""

    @abstractmethod
    def find(self, records: Mapping[str, TensorRecord], settings: Mapping[str, Any] | None) -> dict[str, Stored]:
        """Tensors that are kept as codes in this format, by name; none where the checkpoint is another's.

        Args:
            records: every stored tensor by name. Contents may be read where a header does not say enough.
            settings: `quantization_config` of config.json, whosever it is; None: there is none, and names and types
                of the tensors decide.

        Raises:
            WeightsFormatError, MissingTensorError: the format's, and damaged or incomplete; names the tensor.
            UnsupportedError: a variety of the format that is not known; names it.
        """

    def bits(self, settings: Mapping[str, Any]) -> float | None:
        """Bits a value takes in a file, its share of scales among them, where only the configuration is there.

        Args:
            settings: `quantization_config` with one of the format's methods.

        Returns:
            None where it does not say.
        """
        return None


@dataclass(frozen=True, slots=True)
class Placement(Codec):
    """Element for element: a tensor as it is, cast to another type, or put together from several."""

    pieces: tuple[Piece, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """A run for every piece."""
        return tuple(Run(piece.record, piece.source, piece.count) for piece in self.pieces)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Copy every piece, cast on the way where types differ."""
        flat = out.view(-1)
        for piece, values in zip(self.pieces, stored, strict=True):
            flat[piece.target : piece.target + piece.count].copy_(values)

    def is_identity(self, dtype: torch.dtype, numel: int) -> bool:
        """One piece that is everything, of the same type, at a multiple of its item size in the file."""
        if len(self.pieces) != 1:
            return False
        piece = self.pieces[0]
        record = piece.record
        return (
            record.dtype == dtype
            and piece.target == 0
            and piece.count == numel
            and (record.offset + piece.source * dtype.itemsize) % dtype.itemsize == 0
        )
