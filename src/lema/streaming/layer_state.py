"""One layer's weights: what is stored, where it goes, and which parameters are made of it.

A state knows sources, a layout and the last tier of its chain. When bytes come, and why, is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

import torch

from ..errors import BindingError
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import PAGE, ParameterSource, SlotLayout, align_up
from ..storage.views import Decoder, mapped_or_materialized, materialize, page_aligned, typed_view
from .schedule import Phase
from .tiers import Tier
from .timeline import WAIT, Timeline


class StreamableModel(Protocol):
    """What is asked of a model: what its layers are made of, and to bind them."""

    packs_units: bool

    def unit_sources(self, gbi: GlobalBinaryIndex) -> list[list[ParameterSource]]:
        """Parameter sources of every streamed unit, in the order they are accessed."""

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


class Residency(Enum):
    """Where a layer's weights are between two uses."""

    STREAMED = "streamed"
    """Nowhere for sure: the layer shares its slots with others."""
    RAM = "in RAM"
    """In a host slot of its own."""
    DEVICE = "on the device"
    """In a slot of its own where it is computed."""
    MAPPED = "mapped"
    """In the files, whose pages the parameters are."""
    CUT = "cut"
    """Nowhere as a whole: its runs of rows are units of their own, with a residency each."""


class Scratch:
    """Memory that parameters are decoded into, one layer's at a time.

    Args:
        buffer: uint8 `[n]` where layers are computed, as large as the largest layer needs it.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.holds: list[torch.Tensor] = []
        """Parameters of the layer whose values lie here."""

    def fill(self, parameters: list[torch.Tensor], decode: Decoder) -> None:
        """Decode another layer's parameters, or these anew; autograd is told that the old values are gone."""
        if self.holds is not parameters:
            torch.autograd.graph.increment_version(self.holds)
        torch.autograd.graph.increment_version(parameters)
        decode()
        self.holds = parameters


class LayerState:
    """Everything about one layer's weights. A head, or a run of its rows, has a state as well.

    Layout: `sources` name the parameters, their stored tensors and codecs; `layout` says where those lie in a slot of
    `tier`. A parameter is a typed view of the slot where its stored bytes are its values, else a view of the scratch.
    Each is bound once and never again: only bytes move.

    Mechanics: `acquire` waits until the slot holds the layer's bytes and decodes what needs it; `release` says that the
    use is spent. Whenever the slot starts to be overwritten, `overwritten` raises the version counters of the
    parameters that live there, so that autograd refuses a saved weight whose bytes have gone, in place of computing
    with another layer's. A layer that no tier holds is always there.
    """

    def __init__(
        self,
        unit: int,
        name: str,
        sources: Sequence[ParameterSource],
        residency: Residency,
        layout: SlotLayout | None = None,
    ) -> None:
        self.unit = unit
        self.name = name
        self.sources = sources
        self.residency = residency
        self.layout = layout
        self.tier: Tier | None = None
        self.in_slot: list[torch.Tensor] = []
        self.in_scratch: list[torch.Tensor] = []
        self._pointers: list[int] = []
        self._decode: Decoder | None = None
        self._decodes = 0
        self._scratch: Scratch | None = None
        self._timeline = Timeline()

    # -- binding ---------------------------------------------------------------------------------

    def mapped_views(self, gbi: GlobalBinaryIndex) -> dict[str, torch.Tensor]:
        """Every parameter as a view of the mapped files, or as a tensor of its own where that cannot be."""
        return {source.name: mapped_or_materialized(gbi, source) for source in self.sources}

    def views(self, tier: Tier, scratch: Scratch | None, timeline: Timeline) -> dict[str, torch.Tensor]:
        """Take a slot of the tier; every parameter as a view of it, or of scratch where it has to be decoded."""
        assert self.layout is not None, "a layer without a layout has no place in a slot"
        self.tier, self._scratch, self._timeline = tier, scratch, timeline
        slot, layout = tier.buffer_of(self.unit), self.layout
        found = {v.source.name: typed_view(slot, v.offset, v.source.dtype, v.source.shape) for v in layout.direct}
        if layout.decoded:
            assert scratch is not None, "codes without memory to decode them into"
            self._decode = Decoder(slot, scratch.buffer, layout.decoded)
            for v in layout.decoded:
                found[v.source.name] = typed_view(scratch.buffer, v.offset, v.source.dtype, v.source.shape)
        return found

    def bind(self, parameters: Sequence[torch.Tensor]) -> None:
        """Remember what was made of `views`, in the order of the sources."""
        place = self._scratch.buffer.untyped_storage().data_ptr() if self._scratch is not None else None
        for tensor in parameters:
            decoded = tensor.untyped_storage().data_ptr() == place
            (self.in_scratch if decoded else self.in_slot).append(tensor)
        self._pointers = [tensor.data_ptr() for tensor in parameters]

    def check(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise `BindingError` if a parameter no longer lies where its bytes arrive."""
        for tensor, pointer in zip(parameters, self._pointers, strict=True):
            if tensor.data_ptr() != pointer:
                raise BindingError(
                    f"a parameter of {self.name} (shape {tuple(tensor.shape)}) was moved away from the memory its "
                    "weights are streamed into; do not cast, move or merge a streamed model"
                )

    # -- use -------------------------------------------------------------------------------------

    def label(self, phase: Phase) -> str:
        """What a timeline calls a use."""
        return f"{self.name} {phase.value}"

    def acquire(self, phase: Phase = Phase.FORWARD) -> None:
        """Wait until the parameters hold the layer's weights; they do until `release`.

        Raises:
            ReadError: its bytes could not be read.
            StreamingError: another layer is in use in its slot, or the tier is closed.
        """
        if self.tier is None:
            return
        with self._timeline.span(WAIT, self.name):
            self.tier.acquire(self.unit, phase)
        if self._decode is not None and self._scratch is not None:
            self._scratch.fill(self.in_scratch, self._decode)
            self._decodes += 1

    def release(self) -> None:
        """Say that this use is spent."""
        if self.tier is not None:
            self.tier.release(self.unit)

    def prefetch(self) -> None:
        """Begin to bring the weights, for a use that comes soon."""
        if self.tier is not None:
            self.tier.prefetch(self.unit)

    @property
    def generation(self) -> int:
        """Which filling of its memory the parameters hold; compare while the layer is in use.

        Scratch belongs to the next layer as soon as a use ends, so there every use is a generation of its own.
        """
        if self._decode is not None:
            return self._decodes
        return 0 if self.tier is None else self.tier.cache.generation(self.unit)

    def overwritten(self) -> None:
        """Tell autograd that the parameters in the slot lose their values."""
        torch.autograd.graph.increment_version(self.in_slot)


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
