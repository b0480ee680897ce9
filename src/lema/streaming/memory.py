"""The owner of the tiers: binds a model's parameters to memory and keeps the right bytes there in time.

It knows units as lists of parameter sources and what to do before and after a unit is used. It knows
nothing of attention, losses, or why a unit is visited.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..config import MemoryStrategy
from ..errors import ConfigError, StreamingError
from ..machine.device import check_device
from ..machine.heap import resident_bytes
from ..planning.plain import plan_without_budget
from ..planning.plan import MemoryPlan
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import SlotLayout
from ..storage.reader import DiskReader
from ..storage.views import mapped_or_materialized, materialize, page_aligned
from .boundaries import OffloadedBoundaries
from .head import HEAD, HeadChunks, HeadSlot
from .lane import Lane
from .ring import Load
from .schedule import Phase, Schedule
from .timeline import COMPUTE, Timeline
from .transport import DeviceBackend
from .turn import Turn
from .units import BoundUnit, StreamableAdapter, bind_to_files, bind_to_slot

__all__ = ["MemoryStats", "TripleBufferManager"]

_MAP_FROM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Counters since the manager was made. Bytes and seconds add up over all threads."""

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
        return MemoryStats(
            self.loads - earlier.loads,
            self.bytes_read - earlier.bytes_read,
            self.bytes_copied - earlier.bytes_copied,
            self.wait_seconds - earlier.wait_seconds,
            self.read_seconds - earlier.read_seconds,
        )


class TripleBufferManager:
    """Weights of a model between disk and computation.

    Layout: `num_slots` host slots, each one flat page-aligned buffer as large as the largest unit that
    shares it; a slot of its own, loaded once, for a unit that stays; a device tier of the same kind
    behind them when a backend is given; one scratch area, shared by all units, for
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
        strategy: without a plan, that of one without a budget.
        num_slots: host slots, 2 or more.
        num_readers: disk threads, 1 or more.
        prefetch_depth: visits planned ahead; None: as many as the slots allow; 0: none.
        resident_units: units bound to the mapped files and left out of the ring.
        plan: which units stay in slots of their own, how many slots the others share, and where the head is; None: the
            strategy's, without a budget.
        backend: a device tier's lowest layer; None on CPU.
        device_slots: slots on the device, 2 or more.
        floor: resident bytes that the plan's host peak is counted from; None: those of now.
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
        plan: MemoryPlan | None = None,
        backend: DeviceBackend | None = None,
        device_slots: int = 2,
        floor: int | None = None,
        direct_io: bool | None = None,
        poison: bool = False,
    ) -> None:
        self.strategy = MemoryStrategy.parse(strategy)
        plan = plan or plan_without_budget(
            gbi, adapter, device="cpu" if backend is None else device, strategy=self.strategy, host_slots=num_slots,
            device_slots=device_slots,
        )  # fmt: skip
        if (least := min(plan.host_slots, plan.device_slots)) < 2:
            raise ConfigError(f"num_slots={least} must be 2 or more, or nothing could overlap")
        if backend is None:
            check_device(device)
        self.gbi = gbi
        self.turn = Turn()
        self.adapter = adapter
        self.device = device
        units = adapter.unit_sources(gbi)
        self.num_units = len(units)
        if unknown := [u for u in resident_units if not 0 <= u < len(units)]:
            raise ConfigError(f"resident_units {unknown} are outside 0..{len(units) - 1}")
        placed = {*plan.on_device, *plan.in_ram, *plan.from_disk}
        resident = {*(unit for unit in range(len(units)) if unit not in placed), *resident_units}
        self.streamed = [unit for unit in range(len(units)) if unit not in resident]
        """Units whose bytes come through slots, those that then stay in a slot of their own among them."""
        self._poison = poison
        self._bound: dict[int, BoundUnit] = {}
        self._scratch_unit: int | None = None
        self._decodes = 0
        self.plan = plan
        floor = resident_bytes() if floor is None else floor
        guarded = plan.predicted and backend is None
        self.heap_limit = floor + plan.host_peak - plan.transient // 4 if guarded else None
        """Resident set between layers from which on idle heap is given back; None: none was predicted."""
        self._reader = DiskReader(num_readers, direct_io)
        self.backend = backend
        self._layouts = {
            unit: SlotLayout(units[unit], adapter.packs_units, moved=backend is not None) for unit in self.streamed
        }

        in_ram, on_device = frozenset(plan.in_ram), frozenset(plan.on_device)
        host, self.num_slots = place(self.streamed, in_ram, plan.host_slots, last=on_device)
        self._lane = Lane(
            {unit: layout.extents for unit, layout in self._layouts.items()},
            {unit: layout.nbytes for unit, layout in self._layouts.items()},
            self._reader,
            host,
            place(self.streamed, on_device, plan.device_slots)[0],
            moves={unit: layout.moves for unit, layout in self._layouts.items()},
            depth=prefetch_depth,
            on_overwrite=self._raise_versions,
            backend=backend,
            poison=poison,
        )
        self.timeline = Timeline(backend)
        """Told of reads, copies, waits and uses; records them while asked to."""
        self._lane.observe(self.timeline, "layer {}".format)
        self._scratch = self._make_scratch()
        for unit in self.streamed:
            buffer = self._lane.buffer_of[unit]
            self._bound[unit] = bind_to_slot(adapter, unit, self._layouts[unit], buffer, self._scratch)
        for unit in sorted(resident):
            bind_to_files(adapter, unit, units[unit], gbi)
        self._head: HeadSlot | HeadChunks | None = None
        self._bind_head()
        self._bind_rest()
        self.boundaries: OffloadedBoundaries | None = None
        """Where layers' inputs wait for the backward if not where they are."""
        if backend is not None and plan.boundaries == "host":
            self.boundaries = OffloadedBoundaries(backend, max(self.num_units - len(plan.keep_activations), 1))
        lanes = [self._lane, *([self._head.lane] if self._head is not None else [])]
        self._finalizer = weakref.finalize(self, _shut_down, lanes, self._reader, self.boundaries, backend)

    def _make_scratch(self) -> torch.Tensor:
        nbytes = max((layout.scratch_nbytes for layout in self._layouts.values()), default=0)
        if self.backend is not None:
            return self.backend.device_buffer(nbytes)
        return page_aligned(nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)

    # -- binding ---------------------------------------------------------------------------------

    def _bind_head(self) -> None:
        """Give the head slots of its own where the plan asks for it."""
        self._head_prefetch_at = -1
        plan = self.plan
        chunked = plan.head == "chunked"
        has_slots = plan.head != "mapped" and self.streamed and (self.backend is None or chunked)
        source = self.adapter.head_source(self.gbi) if has_slots else None
        if source is None:
            return
        if chunked:
            self._head = HeadChunks(source, plan.head_rows, self._reader, self.backend, plan.head_in_ram)
            self._head.lane.observe(self.timeline, "head, piece {}".format)
            nothing = torch.zeros((), dtype=source.dtype, device=self._head.device)
            self.adapter.bind_head(nothing.expand(source.shape))
        else:
            self._head = HeadSlot(source, self._reader, stays=plan.head == "resident")
            self._head.lane.observe(self.timeline, lambda _: "head")
            self.adapter.bind_head(self._head.view)
        ahead = 2 + self._head.nbytes // max(max(layout.nbytes for layout in self._layouts.values()), 1)
        self._head_prefetch_at = max(self.num_units - ahead, 0)

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
                    for piece in source.pieces:
                        self.gbi.let_go(piece.record.name)
            else:
                views[source.name] = materialize(self.gbi, source).to(device)
        self.adapter.bind_rest(views, device)

    # -- use -------------------------------------------------------------------------------------

    def predict(self, schedule: Schedule) -> None:
        """Expect these visits, over and over, from now on. Visits of resident units are left out."""
        if self.streamed:
            self._lane.predict(schedule.only(frozenset(self.streamed)))

    @contextlib.contextmanager
    def use(self, unit: int, phase: Phase = Phase.FORWARD) -> Iterator[None]:
        """The unit's parameters hold its weights inside the block.

        Raises:
            ReadError: its bytes could not be read.
            StreamingError: another unit is in use in its slot, or the manager is closed.
        """
        self.acquire(unit, phase)
        try:
            with self.timeline.span(COMPUTE, "head and loss" if unit == HEAD else f"layer {unit} {phase.value}"):
                yield
        finally:
            self.release(unit)

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> None:
        """Wait until the unit's parameters hold its weights; they do until `release`."""
        if unit == HEAD:
            if isinstance(self._head, HeadSlot):
                self._head.acquire()
            return
        bound = self._bound.get(unit)
        if bound is None:
            if not 0 <= unit < self.num_units:
                raise StreamingError(f"unit {unit} was asked for, but there are only 0..{self.num_units - 1}")
            return
        self._lane.acquire(unit, phase)
        if self._head is not None and (unit, phase) == (self._head_prefetch_at, Phase.FORWARD):
            self._head.prefetch()
        if bound.decode is not None:
            for owner in {self._scratch_unit, unit} - {None}:
                torch.autograd.graph.increment_version(self._bound[owner].in_scratch)  # type: ignore[index]
            bound.decode()
            self._scratch_unit = unit

    def release(self, unit: int) -> None:
        """Say that this use of the unit is spent."""
        if unit == HEAD:
            if isinstance(self._head, HeadSlot):
                self._head.release()
            return
        if unit in self._bound:
            self._lane.release(unit)

    @property
    def streams_head(self) -> bool:
        """Whether the head comes and goes as well."""
        return self._head is not None

    @property
    def holds_head(self) -> bool:
        """Whether somebody has acquired the head and not released it yet."""
        return isinstance(self._head, HeadSlot) and self._head.holds > 0

    @property
    def head_chunks(self) -> HeadChunks | None:
        """The head by runs of vocabulary rows, where it is never there whole."""
        return self._head if isinstance(self._head, HeadChunks) else None

    def check_bindings(self) -> None:
        """Raise `BindingError` if a parameter no longer lies where its bytes arrive."""
        for unit, bound in self._bound.items():
            bound.check(unit, self.adapter.bound_tensors(unit))

    def generation(self, unit: int) -> int:
        """Changes whenever the unit's bytes are loaded anew; compare while the unit is in use."""
        bound = self._bound.get(unit)
        if bound is None:
            return 0
        if bound.decode is not None:  # scratch belongs to the next unit as soon as this use ends
            self._decodes += 1
            return -self._decodes
        return self._lane.ring.generation(unit)

    @property
    def stats(self) -> MemoryStats:
        """Counters so far."""
        lanes = [self._lane, *([self._head.lane] if self._head is not None else [])]
        return MemoryStats(
            loads=sum(lane.ring.loads for lane in lanes),
            bytes_read=self._reader.bytes_read,
            bytes_copied=sum(lane.copied_bytes for lane in lanes),
            wait_seconds=sum(lane.wait_seconds for lane in lanes),
            read_seconds=self._reader.read_seconds,
        )

    @property
    def compute_device(self) -> torch.device:
        """Where layers are computed."""
        return self._scratch.device

    @property
    def slot_bytes(self) -> int:
        """Bytes of all host slots and the scratch together."""
        return self._lane.host_bytes + self._scratch.numel()

    def abort(self) -> None:
        """Cancel what is under way and end every thread; the next use starts them again."""
        self._lane.abort()
        if self._head is not None:
            self._head.lane.abort()
        self._reader.stop()

    def close(self) -> None:
        """End every thread for good. Parameters keep their memory but are never filled again."""
        self._finalizer()

    def __enter__(self) -> TripleBufferManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- called by the ring ----------------------------------------------------------------------

    def _raise_versions(self, load: Load) -> None:
        for unit in {load.evicted, load.unit} - {None}:
            torch.autograd.graph.increment_version(self._bound[unit].in_slot)  # type: ignore[index]


def place(
    units: Sequence[int], own: Collection[int], shared: int, last: Collection[int] = ()
) -> tuple[dict[int, int], int]:
    """Slot of every unit, and how many are shared: ranks modulo `shared`, then one each for units of their `own`.

    Units in `last` have ranks after the others, so that units which pass once do not upset those that pass often.
    """
    passing = [unit for unit in units if unit not in own]
    ranked = [unit for unit in passing if unit not in last] + [unit for unit in passing if unit in last]
    shared = min(shared, len(ranked))
    slot_of = {unit: rank % shared for rank, unit in enumerate(ranked)}
    slot_of.update({unit: shared + number for number, unit in enumerate(u for u in units if u in own)})
    return slot_of, shared


def _shut_down(
    lanes: Sequence[Lane], reader: DiskReader, boundaries: OffloadedBoundaries | None, backend: DeviceBackend | None
) -> None:
    for lane in lanes:
        lane.close()
    reader.stop()
    if boundaries is not None:
        boundaries.close()
    if backend is not None:
        backend.close()
