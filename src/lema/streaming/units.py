"""A unit's parameters bound to memory: to a slot, to the scratch, or to the mapped files.

It knows layouts, buffers and the adapter that owns the modules; it knows nothing of when bytes come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import BindingError
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import PAGE, ParameterSource, SlotLayout, align_up
from ..storage.views import Decoder, mapped_or_materialized, materialize, page_aligned, typed_view


class StreamableAdapter(Protocol):
    """What the manager asks of a model adapter: what its units are made of, and to bind them."""

    packs_units: bool

    def unit_sources(self, gbi: GlobalBinaryIndex) -> list[list[ParameterSource]]:
        """Parameter sources of every streamed unit, in visiting order."""

    def rest_sources(self, gbi: GlobalBinaryIndex) -> list[ParameterSource]:
        """Parameter sources of everything that stays."""

    def gathered_by_rows(self) -> frozenset[str]:
        """Names of parameters of which a step reads a few rows only."""

    def bind_unit(self, unit: int, views: Mapping[str, torch.Tensor], flat: torch.Tensor | None) -> None:
        """Make the unit's parameters of these tensors; `flat` holds them back to back if units are packed."""

    def bound_tensors(self, unit: int) -> list[torch.Tensor]:
        """The unit's parameters as its modules hold them now, in the order of its sources."""

    def head_source(self, gbi: GlobalBinaryIndex) -> ParameterSource | None:
        """Source of the head's weight, if its stored bytes are all it takes to compute with it."""

    def bind_head(self, view: torch.Tensor) -> None:
        """Make the head's weight of this tensor, apart from the embedding even where the two are tied."""

    def bind_rest(self, views: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Make everything that stays of these tensors; what is computed with them lies on `device`."""


@dataclass(slots=True)
class BoundUnit:
    """A streamed unit's parameters, by where they lie, and how to fill the ones in scratch."""

    in_slot: list[torch.Tensor]
    in_scratch: list[torch.Tensor]
    pointers: list[int]
    decode: Decoder | None

    def check(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        """Raise `BindingError` if a parameter no longer lies where its bytes arrive."""
        for tensor, pointer in zip(tensors, self.pointers, strict=True):
            if tensor.data_ptr() != pointer:
                raise BindingError(
                    f"a parameter of layer {unit} (shape {tuple(tensor.shape)}) was moved away from the memory its "
                    "weights are streamed into; do not cast, move or merge a streamed model"
                )


def bind_to_slot(
    adapter: StreamableAdapter, unit: int, layout: SlotLayout, buffer: torch.Tensor, scratch: torch.Tensor
) -> BoundUnit:
    """Make a unit's parameters views of a slot, and of scratch where stored bytes are not computed with."""
    views = {v.source.name: typed_view(buffer, v.offset, v.source.dtype, v.source.shape) for v in layout.direct}
    for decoded in layout.decoded:
        source = decoded.source
        views[source.name] = typed_view(scratch, decoded.offset, source.dtype, source.shape)
    adapter.bind_unit(unit, views, scratch[: layout.scratch_nbytes] if adapter.packs_units else None)
    tensors = adapter.bound_tensors(unit)
    place = scratch.untyped_storage().data_ptr()
    return BoundUnit(
        in_slot=[t for t in tensors if t.untyped_storage().data_ptr() != place],
        in_scratch=[t for t in tensors if t.untyped_storage().data_ptr() == place],
        pointers=[t.data_ptr() for t in tensors],
        decode=Decoder(buffer, scratch, layout.decoded) if layout.decoded else None,
    )


def bind_to_files(
    adapter: StreamableAdapter, unit: int, sources: Sequence[ParameterSource], gbi: GlobalBinaryIndex
) -> None:
    """Make a unit's parameters views of the mapped files."""
    if adapter.packs_units:
        flat, views = pack(gbi, sources)
        adapter.bind_unit(unit, views, flat)
    else:
        adapter.bind_unit(unit, {source.name: mapped_or_materialized(gbi, source) for source in sources}, None)


def pack(gbi: GlobalBinaryIndex, sources: Sequence[ParameterSource]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Parameters back to back in one uint8 buffer, in the order given, and a typed view of each."""
    flat = page_aligned(align_up(sum(source.nbytes for source in sources), PAGE))
    views = {}
    offset = 0
    for source in sources:
        view = typed_view(flat, offset, source.dtype, source.shape)
        view.copy_(materialize(gbi, source))
        views[source.name] = view
        offset += source.nbytes
    return flat[:offset], views
