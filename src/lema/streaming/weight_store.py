"""The owner of a model's frozen weights: binds its parameters to memory and keeps the right bytes there in time.

It decides nothing: a plan says what stays and what comes and goes. Attention, losses and the reason why a layer is
asked for are other rooms' business.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch

from ..errors import StreamingError
from ..machine.device import check_device
from ..machine.heap import resident_bytes
from ..planning.plan import MemoryPlan
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource, SlotLayout
from ..storage.reader import DiskReader
from ..storage.views import mapped_or_materialized, materialize, page_aligned
from .backend import DeviceBackend
from .boundaries import BoundaryStore, KeptBoundaries, OffloadedBoundaries
from .device_tier import DeviceTier
from .head import HeadChunks, HeadState, cut_head
from .layer_state import LayerState, Residency, Scratch, StreamableModel, pack
from .schedule import Access, AccessSchedule, Phase
from .slot_cache import Load
from .tiers import HostTier, Tier, place
from .timeline import COMPUTE, Timeline
from .turn import Turn

_MAP_FROM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Counters since the store was made. Bytes and seconds add up over all threads."""

    loads: int = 0
    """Units brought into slots."""
    bytes_read: int = 0
    """From disk."""
    bytes_copied: int = 0
    """To the device."""
    wait_seconds: float = 0.0
    """Computation waited for weights."""
    read_seconds: float = 0.0
    """Threads were reading."""

    def __sub__(self, earlier: MemoryStats) -> MemoryStats:
        return MemoryStats(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


class WeightStore:
    """Weights of a model between disk and computation.

    Layout: a `LayerState` for every layer, one for the head, and one for each run of rows where the head is cut. The
    layers' tiers are host slots, as many as the plan says and one more for each layer that stays, and device slots
    behind them where there is a device; the head has a chain of its own, so that it neither sets the size of a slot
    nor evicts a layer. All layers share one scratch.

    Mechanics: `use(unit, phase)` waits until the unit's weights are where they are computed with, and says afterwards
    that the use is spent; meanwhile the tiers run ahead, in the order that `predict` was told.

    Args:
        gbi: the index of the weights.
        adapter: says what the layers are and binds them.
        plan: which layers stay where, how many slots the others share, and where the head and boundaries are.
        device: 'cpu' computes in host slots.
        num_readers: disk threads, 1 or more.
        prefetch_depth: accesses planned ahead; None: as many as the slots allow; 0: none.
        backend: a device tier's lowest layer; None on CPU.
        floor: resident bytes that the plan's host peak is counted from; None: those of now.
        direct_io: None: direct reads where granted; False: through the page cache.
        poison: fill a slot with NaN bytes before each load (for tests).

    Raises:
        DeviceError: the device is not there.
        PlanError: the plan is for another model or device.
        MissingTensorError, ShapeMismatchError, UnsupportedError: the files do not fit the model.
    """

    def __init__(
        self,
        gbi: GlobalBinaryIndex,
        adapter: StreamableModel,
        plan: MemoryPlan,
        device: str = "cuda",
        *,
        num_readers: int = 2,
        prefetch_depth: int | None = None,
        backend: DeviceBackend | None = None,
        floor: int | None = None,
        direct_io: bool | None = None,
        poison: bool = False,
    ) -> None:
        if backend is None:
            check_device(device)
        self.gbi = gbi
        self.adapter = adapter
        self.plan = plan
        self.device = device
        self.backend = backend
        self.turn = Turn()
        self.timeline = Timeline(backend)
        """Told of reads, copies, waits and uses; records them while asked to."""
        self.heap_limit = None
        """Resident set between layers from which on idle heap is given back; None: the plan has no limit."""
        if plan.heap_limit is not None:
            self.heap_limit = plan.heap_limit + (resident_bytes() if floor is None else floor)
        self._reader = DiskReader(num_readers, direct_io)
        self._depth = prefetch_depth
        self._poison = poison

        self._layers = self._describe_layers(plan)
        self.streamed = [state.unit for state in self._layers if state.residency is not Residency.MAPPED]
        """Layers whose bytes come through slots, those that then stay in a slot of their own among them."""
        self._scratch = Scratch(self._scratch_memory())
        self._tier, self.num_slots = self._layers_tier(plan)
        self._bind_layers()
        self._head, self.head_chunks, self._head_tier = self._open_head(plan)
        pieces = self.head_chunks.states if self.head_chunks is not None else []
        self._states = [*self._layers, self._head, *pieces]
        self._head_prefetch_at = self._when_to_prefetch_head()
        self._bind_rest()
        self.boundaries = self._open_boundaries(plan)
        """Where layers' inputs wait for their backward."""
        self._finalizer = weakref.finalize(self, _shut_down, self._tiers, self._reader, self.boundaries, backend)

    # -- construction ----------------------------------------------------------------------------

    def _describe_layers(self, plan: MemoryPlan) -> list[LayerState]:
        units = self.adapter.unit_sources(self.gbi)
        plan.check(len(units), self.backend is None)
        residency = {
            **dict.fromkeys(plan.from_disk, Residency.STREAMED),
            **dict.fromkeys(plan.in_ram, Residency.RAM),
            **dict.fromkeys(plan.on_device, Residency.DEVICE),
            **dict.fromkeys(plan.mapped, Residency.MAPPED),
        }
        return [self._describe(unit, sources, residency[unit]) for unit, sources in enumerate(units)]

    def _describe(self, unit: int, sources: Sequence[ParameterSource], residency: Residency) -> LayerState:
        layout = None
        if residency is not Residency.MAPPED:
            layout = SlotLayout(sources, self.adapter.packs_units, moved=self.backend is not None)
        return LayerState(unit, f"layer {unit}", sources, residency, layout)

    def _scratch_memory(self) -> torch.Tensor:
        nbytes = max((state.layout.scratch_nbytes for state in self._layers if state.layout is not None), default=0)
        if self.backend is not None:
            return self.backend.device_buffer(nbytes)
        return page_aligned(nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)

    def _layers_tier(self, plan: MemoryPlan) -> tuple[Tier, int]:
        """The last tier of the layers' chain, and how many host slots are shared."""
        host, shared = place(self.streamed, plan.in_ram, plan.host_slots, last=plan.on_device)
        device = place(self.streamed, plan.on_device, plan.device_slots)[0]
        return self._open_tiers([self._layers[unit] for unit in self.streamed], host, device, self._depth), shared

    def _open_tiers(
        self,
        states: Sequence[LayerState],
        host: dict[int, int],
        device: dict[int, int],
        depth: int | None,
        stream: str = "weights",
    ) -> Tier:
        """The chain for these units, each with a host slot and, if there is a device, a slot there; its last tier."""
        by_unit = {state.unit: state for state in states}
        layouts = {state.unit: state.layout for state in states if state.layout is not None}
        names = {state.unit: state.name for state in states}.__getitem__
        tier: Tier = HostTier(layouts, host, self._reader, depth, self.timeline, names, self._poison)
        if self.backend is not None:
            for buffer in tier.buffers:
                self.backend.pin(buffer)
            tier.cache.learns = False  # the first cycle has loads that later ones do not have
            ahead = None if depth is None else max(depth, 1)
            moves = {unit: layout.moves for unit, layout in layouts.items()}
            tier = DeviceTier(
                self.backend, tier, device, AccessSchedule(()), ahead, moves, stream, self.timeline, names
            )
        tier.cache.on_overwrite = partial(_tell_overwritten, by_unit)
        return tier

    def _bind_layers(self) -> None:
        for state in self._layers:
            unit, flat = state.unit, None
            if state.layout is None:
                if self.adapter.packs_units:
                    flat, views = pack(self.gbi, state.sources)
                else:
                    views = state.mapped_views(self.gbi)
                self.adapter.bind_unit(unit, views, flat)
                continue
            views = state.views(self._tier, self._scratch, self.timeline)
            if self.adapter.packs_units:
                flat = self._scratch.buffer[: state.layout.scratch_nbytes]
            self.adapter.bind_unit(unit, views, flat)
            state.bind(self.adapter.bound_tensors(unit))

    def _open_head(self, plan: MemoryPlan) -> tuple[HeadState, HeadChunks | None, Tier | None]:
        """The head, its runs where it is cut, and their last tier; none where it is bound with what stays."""
        chunked = plan.head == "chunked"
        has_slots = plan.head != "mapped" and bool(self.streamed) and (self.backend is None or chunked)
        source = self.adapter.head_source(self.gbi) if has_slots else None
        if source is None:
            return HeadState(self.head_unit, None, Residency.MAPPED), None, None
        if chunked:
            chunks = cut_head(source, plan.head_rows, self.head_unit + 1, moved=self.backend is not None)
            head = HeadState(self.head_unit, None, Residency.CUT)
            return head, chunks, self._bind_chunks(chunks, source, plan.head_in_ram)
        residency = Residency.RAM if plan.head == "resident" else Residency.STREAMED
        head = HeadState(self.head_unit, source, residency)
        return head, None, self._bind_head(head)

    def _bind_head(self, head: HeadState) -> Tier:
        tier = self._open_tiers([head], {head.unit: 0}, {}, depth=0)
        tier.predict(AccessSchedule((Access(head.unit, Phase.FORWARD),)))
        (view,) = head.views(tier, None, self.timeline).values()
        head.bind([view])
        self.adapter.bind_head(view)
        return tier

    def _bind_chunks(self, chunks: HeadChunks, source: ParameterSource, in_ram: bool) -> Tier:
        units = [state.unit for state in chunks.states]
        host, device = place(units, units if in_ram else (), 2)[0], place(units, (), 2)[0]
        tier = self._open_tiers(chunks.states, host, device, None, "head")
        tier.predict(AccessSchedule(tuple(Access(unit, Phase.FORWARD) for unit in units)))
        for state in chunks.states:
            state.bind(list(state.views(tier, None, self.timeline).values()))
        nothing = torch.zeros((), dtype=source.dtype, device=self.compute_device)
        self.adapter.bind_head(nothing.expand(source.shape))
        return tier

    def _when_to_prefetch_head(self) -> int:
        """Layer at whose forward the head's reads begin, so that they end about when the last layer does."""
        if self._head_tier is None:
            return -1
        largest = max(state.layout.nbytes for state in self._layers if state.layout is not None)
        return max(self.num_units - 2 - self._head_tier.host_bytes // max(largest, 1), 0)

    def _bind_rest(self) -> None:
        views = {}
        by_rows = self.adapter.gathered_by_rows()
        device = self.compute_device
        for source in self.adapter.rest_sources(self.gbi):
            if source.name in by_rows and len(source.pieces) == 1:
                record = source.pieces[0].record
                self.gbi.advise_random(record.name)
                views[source.name] = self.gbi.view(record.name)
            elif source.nbytes >= _MAP_FROM_BYTES:
                views[source.name] = mapped_or_materialized(self.gbi, source).to(device)
                if self.backend is not None:
                    for run in source.codec.runs:
                        self.gbi.evict(run.record.name)
            else:
                views[source.name] = materialize(self.gbi, source).to(device)
        self.adapter.bind_rest(views, device)

    def _open_boundaries(self, plan: MemoryPlan) -> BoundaryStore:
        if self.backend is None or plan.boundaries != "host":
            return KeptBoundaries()
        return OffloadedBoundaries(self.backend, max(self.num_units - len(plan.keep_activations), 1))

    # -- use -------------------------------------------------------------------------------------

    @property
    def num_units(self) -> int:
        """Layers; they are numbered from 0."""
        return len(self._layers)

    @property
    def head_unit(self) -> int:
        """The head's number: it can be asked for like a layer, wherever it is. Runs of its rows follow."""
        return len(self._layers)

    def predict(self, schedule: AccessSchedule) -> None:
        """Expect these accesses, over and over, from now on. Those of mapped layers are left out."""
        if self.streamed:
            self._tier.predict(schedule.only(frozenset(self.streamed)))

    @contextlib.contextmanager
    def use(self, unit: int, phase: Phase = Phase.FORWARD) -> Iterator[None]:
        """The unit's parameters hold its weights inside the block; raises as `LayerState.acquire` does."""
        self.acquire(unit, phase)
        try:
            with self.timeline.span(COMPUTE, self._state(unit).label(phase)):
                yield
        finally:
            self.release(unit)

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> None:
        """Wait until the unit's parameters hold its weights; they do until `release`."""
        self._state(unit).acquire(phase)
        if (unit, phase) == (self._head_prefetch_at, Phase.FORWARD):
            self._states[self.head_unit + (self.head_chunks is not None)].prefetch()

    def release(self, unit: int) -> None:
        """Say that this use of the unit is spent."""
        self._state(unit).release()

    def _state(self, unit: int) -> LayerState:
        if not 0 <= unit < len(self._states):
            raise StreamingError(f"unit {unit} was asked for, but there are only 0..{self.num_units - 1}")
        return self._states[unit]

    @property
    def streams_head(self) -> bool:
        """Whether the head has slots of its own."""
        return self._head_tier is not None

    @property
    def holds_head(self) -> bool:
        """Whether somebody has acquired the head and not released it yet."""
        return self._head.holds > 0

    def generation(self, unit: int) -> int:
        """Changes whenever the unit's weights are brought anew; see `LayerState.generation`."""
        return self._state(unit).generation

    def check_bindings(self) -> None:
        """Raise `BindingError` if a parameter no longer lies where its bytes arrive."""
        for unit in self.streamed:
            self._layers[unit].check(self.adapter.bound_tensors(unit))

    # -- what there is ---------------------------------------------------------------------------

    @property
    def _tiers(self) -> list[Tier]:
        return [self._tier, *([self._head_tier] if self._head_tier is not None else [])]

    @property
    def stats(self) -> MemoryStats:
        """Counters so far."""
        return MemoryStats(
            loads=sum(tier.cache.loads for tier in self._tiers),
            bytes_read=self._reader.bytes_read,
            bytes_copied=sum(tier.copied_bytes for tier in self._tiers),
            wait_seconds=sum(tier.wait_seconds for tier in self._tiers),
            read_seconds=self._reader.read_seconds,
        )

    @property
    def compute_device(self) -> torch.device:
        """Where layers are computed."""
        return self._scratch.buffer.device

    # -- the end ---------------------------------------------------------------------------------

    def abort(self) -> None:
        """Cancel what is under way and end every thread; the next use starts them again."""
        for tier in self._tiers:
            tier.abort()
        self._reader.stop()

    def close(self) -> None:
        """End every thread for good. Parameters keep their memory but are never filled again."""
        self._finalizer()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tell_overwritten(states: Mapping[int, LayerState], load: Load) -> None:
    """Called by a tier right before it fills a slot; it must not hold the store, whose end ends the tiers."""
    for unit in {load.evicted, load.unit} - {None}:
        states[unit].overwritten()  # type: ignore[index]


def _shut_down(
    tiers: Sequence[Tier], reader: DiskReader, boundaries: BoundaryStore, backend: DeviceBackend | None
) -> None:
    for tier in tiers:
        tier.close()
    reader.stop()
    boundaries.close()
    if backend is not None:
        backend.close()
