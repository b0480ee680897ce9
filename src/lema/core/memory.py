"""The owner of the tiers: binds a model's parameters to memory and keeps the right bytes there in time.

It knows units as lists of parameter sources and what to do before and after a unit is used. It knows
nothing of attention, losses, or why a unit is visited.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..config import MemoryStrategy
from ..errors import BindingError, ConfigError, DeviceError, StreamingError
from .binding import Decoder, mapped_or_materialized, materialize, page_aligned, typed_view
from .gbi import GlobalBinaryIndex
from .head import HEAD, HeadSlot, head_should_stream
from .layout import PAGE, ParameterSource, SlotLayout, align_up
from .reader import DiskReader, ReadJob
from .ring import Load, Ring
from .schedule import Phase, Schedule
from .transport import DeviceBackend, DeviceTier

_MAP_FROM_BYTES = 1 << 20


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

    def bind_rest(self, views: Mapping[str, torch.Tensor]) -> None:
        """Make everything that stays of these tensors."""


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Counters since the manager was made. Bytes and seconds add up over all threads."""

    loads: int = 0
    bytes_read: int = 0
    bytes_copied: int = 0
    wait_seconds: float = 0.0
    read_seconds: float = 0.0

    def __sub__(self, earlier: MemoryStats) -> MemoryStats:
        return MemoryStats(
            self.loads - earlier.loads,
            self.bytes_read - earlier.bytes_read,
            self.bytes_copied - earlier.bytes_copied,
            self.wait_seconds - earlier.wait_seconds,
            self.read_seconds - earlier.read_seconds,
        )


@dataclass(slots=True)
class _Bound:
    """A streamed unit's parameters, by where they lie, and how to fill the ones in scratch."""

    in_slot: list[torch.Tensor]
    in_scratch: list[torch.Tensor]
    pointers: list[int]
    decode: Decoder | None


class TripleBufferManager:
    """Weights of a model between disk and computation.

    Layout: `num_slots` host slots, each one flat page-aligned buffer as large as the largest streamed
    unit; a device tier behind them when a backend is given; one scratch area, shared by all units, for
    parameters whose stored bytes are not what is computed with. Every parameter is bound once, as a
    typed view of its slot or of scratch, and never again: only bytes move.

    Mechanics: `use(unit, phase)` waits until the unit's bytes are where they are computed with, decodes
    what needs decoding, and says afterwards that the use is spent. Whenever a slot starts to be
    overwritten the version counters of the parameters that live there are raised, so autograd refuses
    a saved weight whose bytes have gone, in place of computing with another unit's.

    Args:
        gbi: the index of the weights.
        adapter: says what the units are and binds them.
        device: 'cpu' computes in host slots.
        strategy: RESIDENT binds everything to the mapped files and streams nothing.
        num_slots: host slots, 2 or more.
        num_readers: disk threads, 1 or more.
        prefetch_depth: visits planned ahead; None: as many as there are slots; 0: none.
        resident_units: units bound to the mapped files and left out of the ring.
        backend: a device tier's lowest layer; None on CPU.
        device_slots: slots on the device, 2 or more.
        direct_io: None: direct reads where granted; False: through the page cache.
        poison: fill a slot with NaN bytes before each load (for tests).

    Raises:
        DeviceError: the device is not there.
        MissingTensorError, ShapeMismatchError, UnsupportedError: the files do not fit the model.
    """

    def __init__(
        self,
        gbi: GlobalBinaryIndex,
        adapter: StreamableAdapter,
        device: str = "cuda",
        strategy: MemoryStrategy | str = MemoryStrategy.STREAMING,
        *,
        num_slots: int = 2,
        num_readers: int = 2,
        prefetch_depth: int | None = None,
        resident_units: Collection[int] = (),
        backend: DeviceBackend | None = None,
        device_slots: int = 2,
        direct_io: bool | None = None,
        poison: bool = False,
    ) -> None:
        if num_slots < 2 or device_slots < 2:
            raise ConfigError(f"num_slots={min(num_slots, device_slots)} must be 2 or more, or nothing could overlap")
        if backend is None:
            check_device(device)
        self.gbi = gbi
        self.adapter = adapter
        self.device = device
        self.strategy = MemoryStrategy.parse(strategy)
        units = adapter.unit_sources(gbi)
        self.num_units = len(units)
        if unknown := [u for u in resident_units if not 0 <= u < len(units)]:
            raise ConfigError(f"resident_units {unknown} are outside 0..{len(units) - 1}")
        resident = set(range(len(units))) if self.strategy is MemoryStrategy.RESIDENT else set(resident_units)
        self.streamed = [unit for unit in range(len(units)) if unit not in resident]
        self.num_slots = min(num_slots, max(len(self.streamed), 1))
        self._poison = poison
        self._bound: dict[int, _Bound] = {}
        self._tier: DeviceTier | None = None
        self._scratch_unit: int | None = None
        self._reader = DiskReader(num_readers, direct_io)
        self._layouts = {unit: SlotLayout(units[unit], adapter.packs_units) for unit in self.streamed}

        slot_of = {unit: rank % self.num_slots for rank, unit in enumerate(self.streamed)}
        nbytes = {unit: layout.nbytes for unit, layout in self._layouts.items()}
        self._host_buffers = [page_aligned(max(nbytes.values(), default=0)) for _ in set(slot_of.values())]
        depth = self.num_slots if prefetch_depth is None else prefetch_depth
        schedule = Schedule.inference(self.num_units)
        fill = _weakly(self._start_read)
        if backend is None:
            self._ring = Ring(slot_of, Schedule(()), depth, fill)
            compute_buffers, compute_ring = self._host_buffers, self._ring
        else:
            device_slot_of = {unit: rank % device_slots for rank, unit in enumerate(self.streamed)}
            ahead = schedule.only(frozenset(self.streamed)).loads(device_slot_of)
            self._ring = Ring(slot_of, ahead, depth, fill)
            self._tier = DeviceTier(
                backend, self._ring, self._host_buffers, device_slot_of, Schedule(()), max(depth, 1), nbytes
            )
            compute_buffers, compute_ring = self._tier.buffers, self._tier.ring
        self._compute_ring = compute_ring
        compute_ring.on_overwrite = _weakly(self._raise_versions)
        scratch_bytes = max((layout.scratch_nbytes for layout in self._layouts.values()), default=0)
        self._scratch = page_aligned(scratch_bytes) if scratch_bytes else torch.empty(0, dtype=torch.uint8)
        for unit in self.streamed:
            self._bind_streamed(unit, compute_buffers[compute_ring.slot_of[unit]])
        for unit in sorted(resident):
            self._bind_resident(unit, units[unit])
        self._head: HeadSlot | None = None
        self._bind_head(backend)
        self._bind_rest()
        rings = [self._ring] if self._head is None else [self._ring, self._head.ring]
        self._finalizer = weakref.finalize(self, _shut_down, self._tier, rings, self._reader)

    # -- binding ---------------------------------------------------------------------------------

    def _bind_streamed(self, unit: int, buffer: torch.Tensor) -> None:
        layout = self._layouts[unit]
        views = {v.source.name: typed_view(buffer, v.offset, v.source.dtype, v.source.shape) for v in layout.direct}
        for decoded in layout.decoded:
            source = decoded.source
            views[source.name] = typed_view(self._scratch, decoded.offset, source.dtype, source.shape)
        flat = self._scratch[: layout.scratch_nbytes] if self.adapter.packs_units else None
        self.adapter.bind_unit(unit, views, flat)
        tensors = self.adapter.bound_tensors(unit)
        scratch = self._scratch.untyped_storage().data_ptr()
        self._bound[unit] = _Bound(
            in_slot=[t for t in tensors if t.untyped_storage().data_ptr() != scratch],
            in_scratch=[t for t in tensors if t.untyped_storage().data_ptr() == scratch],
            pointers=[t.data_ptr() for t in tensors],
            decode=Decoder(buffer, self._scratch, layout.decoded) if layout.decoded else None,
        )

    def _bind_resident(self, unit: int, sources: Sequence[ParameterSource]) -> None:
        if self.adapter.packs_units:
            flat, views = pack(self.gbi, sources)
            self.adapter.bind_unit(unit, views, flat)
        else:
            views = {source.name: mapped_or_materialized(self.gbi, source) for source in sources}
            self.adapter.bind_unit(unit, views, None)

    def _bind_head(self, backend: DeviceBackend | None) -> None:
        """Stream the head too where that is worth its reads, begun early enough before the end of a forward."""
        self._head_prefetch_at = -1
        source = self.adapter.head_source(self.gbi) if self.streamed and backend is None else None
        a_step = 2 * sum(layout.read_bytes for layout in self._layouts.values())
        if source is None or not head_should_stream(source.nbytes, a_step):
            return
        self._head = HeadSlot(source, self._reader)
        self.adapter.bind_head(self._head.view)
        ahead = 2 + self._head.nbytes // max(max(layout.nbytes for layout in self._layouts.values()), 1)
        self._head_prefetch_at = max(self.num_units - ahead, 0)

    def _bind_rest(self) -> None:
        views = {}
        by_rows = self.adapter.gathered_by_rows()
        for source in self.adapter.rest_sources(self.gbi):
            if source.name in by_rows and len(source.pieces) == 1:
                record = source.pieces[0].record
                self.gbi.advise_random(record.name)
                views[source.name] = self.gbi.view(record.name)
            elif source.nbytes >= _MAP_FROM_BYTES:
                views[source.name] = mapped_or_materialized(self.gbi, source)
            else:
                views[source.name] = materialize(self.gbi, source)
        self.adapter.bind_rest(views)

    # -- use -------------------------------------------------------------------------------------

    def predict(self, schedule: Schedule) -> None:
        """Expect these visits, over and over, from now on. Visits of resident units are left out."""
        if not self.streamed:
            return
        ahead = schedule.only(frozenset(self.streamed))
        changed = self._compute_ring.predict(ahead)
        if self._tier is not None and changed:
            self._ring.predict(ahead.loads(self._tier.ring.slot_of))

    @contextlib.contextmanager
    def use(self, unit: int, phase: Phase = Phase.FORWARD) -> Iterator[None]:
        """The unit's parameters hold its weights inside the block.

        Raises:
            ReadError: its bytes could not be read.
            StreamingError: another unit is in use in its slot, or the manager is closed.
        """
        self.acquire(unit, phase)
        try:
            yield
        finally:
            self.release(unit)

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> None:
        """Wait until the unit's parameters hold its weights; they do until `release`."""
        if unit == HEAD:
            if self._head is not None:
                self._head.acquire()
            return
        bound = self._bound.get(unit)
        if bound is None:
            if not 0 <= unit < self.num_units:
                raise StreamingError(f"unit {unit} was asked for, but there are only 0..{self.num_units - 1}")
            return
        if self._tier is None:
            self._ring.acquire(unit, phase)
        else:
            self._tier.acquire(unit, phase)
        if self._head is not None and not self._head.holds and (unit, phase) == (self._head_prefetch_at, Phase.FORWARD):
            self._head.ring.prefetch(HEAD)
        if bound.decode is not None:
            for owner in {self._scratch_unit, unit} - {None}:
                torch.autograd.graph.increment_version(self._bound[owner].in_scratch)  # type: ignore[index]
            bound.decode()
            self._scratch_unit = unit

    def release(self, unit: int) -> None:
        """Say that this use of the unit is spent."""
        if unit == HEAD:
            if self._head is not None:
                self._head.release()
            return
        if unit not in self._bound:
            return
        if self._tier is None:
            self._ring.release(unit)
        else:
            self._tier.release(unit)

    @property
    def streams_head(self) -> bool:
        """Whether the head comes and goes as well."""
        return self._head is not None

    @property
    def holds_head(self) -> bool:
        """Whether somebody has acquired the head and not released it yet."""
        return self._head is not None and self._head.holds > 0

    def check_bindings(self) -> None:
        """Raise `BindingError` if a parameter no longer lies where its bytes arrive."""
        for unit, bound in self._bound.items():
            for tensor, pointer in zip(self.adapter.bound_tensors(unit), bound.pointers, strict=True):
                if tensor.data_ptr() != pointer:
                    raise BindingError(
                        f"a parameter of layer {unit} (shape {tuple(tensor.shape)}) was moved away from the memory "
                        "its weights are streamed into; do not cast, move or merge a streamed model"
                    )

    @property
    def stats(self) -> MemoryStats:
        """Counters so far."""
        return MemoryStats(
            loads=self._compute_ring.loads + (self._head.ring.loads if self._head else 0),
            bytes_read=self._reader.bytes_read,
            bytes_copied=self._tier.copied_bytes if self._tier else 0,
            wait_seconds=self._compute_ring.wait_seconds + (self._head.ring.wait_seconds if self._head else 0.0),
            read_seconds=self._reader.read_seconds,
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of all host slots and the scratch together."""
        return sum(buffer.numel() for buffer in self._host_buffers) + self._scratch.numel()

    def abort(self) -> None:
        """Cancel what is under way and end every thread; the next use starts them again."""
        if self._tier is not None:
            self._tier.ring.abort()
            self._tier.stop()
        self._ring.abort()
        if self._head is not None:
            self._head.ring.abort()
        self._reader.stop()

    def close(self) -> None:
        """End every thread for good. Parameters keep their memory but are never filled again."""
        self._finalizer()

    def __enter__(self) -> TripleBufferManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- called by the ring ----------------------------------------------------------------------

    def _start_read(self, load: Load) -> None:
        buffer = self._host_buffers[load.slot]
        if self._poison:
            buffer.fill_(0xFF)
        self._reader.submit(
            ReadJob(
                extents=self._layouts[load.unit].extents,
                buffer=memoryview(buffer.numpy()),  # type: ignore[arg-type]
                cancelled=lambda: load.cancelled,
                done=lambda error: self._ring.finished(load, error),
            )
        )

    def _raise_versions(self, load: Load) -> None:
        for unit in {load.evicted, load.unit} - {None}:
            torch.autograd.graph.increment_version(self._bound[unit].in_slot)  # type: ignore[index]


def _weakly(method: Callable[[Load], None]) -> Callable[[Load], None]:
    """The bound method without keeping its object alive, so that a forgotten manager can end its threads."""
    weak = weakref.WeakMethod(method)

    def call(load: Load) -> None:
        if (strong := weak()) is not None:
            strong(load)

    return call


def _shut_down(tier: DeviceTier | None, rings: Sequence[Ring], reader: DiskReader) -> None:
    if tier is not None:
        tier.ring.close()
    for ring in rings:
        ring.close()
    if tier is not None:
        tier.stop()
    reader.stop()


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


def check_device(device: str) -> None:
    """Raise `DeviceError` unless layers can be computed on this device by this version."""
    kind = torch.device(device).type
    if kind == "cpu":
        return
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device={device!r} was asked for, but this torch sees no CUDA device. Install a torch build for your "
            "GPU and driver, or choose device='cpu'"
        )
    raise DeviceError(f"device={device!r} is not supported yet: streaming computes on the CPU; choose device='cpu'")
