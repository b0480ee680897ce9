"""The tiers a unit's bytes come through, and the first of them: host slots, filled from disk.

A tier knows slots and what lies below it; it knows nothing of parameters or of what a unit is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from ..storage.layout import SlotLayout
from ..storage.reader import DiskReader, ReadJob
from ..storage.views import evict_pages, page_aligned
from .schedule import AccessSchedule, Phase
from .slot_cache import Load, SlotCache
from .timeline import DISK, Timeline

unit_name: Callable[[int], str] = "unit {}".format
"""What a unit is called in a timeline by those who know no better."""


class Tier:
    """Slots at one place, and the tier below, out of which they are filled; the first one is filled from files.

    A user asks the last tier of a chain, whose slots lie where it is computed, and knows no other. The shortest chain
    has one tier. Schedules, aborts and the end go down the chain.

    Args:
        cache: says which slot holds what; its `fill` brings bytes into `buffers`.
        buffers: uint8 `[n]` for every slot.
        below: the tier before; None: files.
    """

    copied_bytes = 0
    """Bytes brought from the tier below so far."""

    def __init__(self, cache: SlotCache, buffers: Sequence[torch.Tensor], below: Tier | None = None) -> None:
        self.cache = cache
        self.buffers = list(buffers)
        self.below = below

    def buffer_of(self, unit: int) -> torch.Tensor:
        """The slot that is the unit's, whatever it holds now."""
        return self.buffers[self.cache.slot_of[unit]]

    @property
    def host_bytes(self) -> int:
        """Bytes of all host slots of the chain."""
        return sum(buffer.numel() for buffer in self.buffers) if self.below is None else self.below.host_bytes

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation stood still for units so far."""
        return self.cache.wait_seconds

    def predict(self, schedule: AccessSchedule) -> None:
        """Expect these accesses, over and over, from now on; the tier below is accessed once for every load."""
        if self.cache.predict(schedule) and self.below is not None:
            self.below.predict(schedule.loads(self.cache.slot_of))

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> int:
        """Number of the slot that holds the unit from now until `release`; see `SlotCache.acquire`."""
        return self.cache.acquire(unit, phase)

    def release(self, unit: int) -> None:
        """Say that a use of the unit is spent."""
        self.cache.release(unit)

    def prefetch(self, unit: int, phase: Phase = Phase.FORWARD) -> None:
        """Begin to bring a unit that will be asked for soon."""
        self.cache.prefetch(unit, phase)

    def evict(self) -> bool:
        """Empty the slots that nobody uses or is about to use, memory and all; False if some are not empty now."""
        empty = self.cache.evict()
        if empty and self.below is None:
            for buffer in self.buffers:
                evict_pages(buffer)
        return empty

    def abort(self) -> None:
        """Cancel what is under way, from the last tier down."""
        self.cache.abort()
        self.stop()
        if self.below is not None:
            self.below.abort()

    def close(self) -> None:
        """Refuse further accesses and end every thread."""
        self.cache.close()
        if self.below is not None:
            self.below.close()
        self.stop()

    def stop(self) -> None:
        """End the tier's threads; they start again when they are needed."""


class HostTier(Tier):
    """Host slots filled from files.

    Layout: every slot is a flat page-aligned buffer as large as the largest unit that lives there.

    Args:
        layouts: what is read for each unit, and where to.
        slot_of: slot of each unit.
        reader: reads; its owner stops it.
        depth: accesses planned ahead; None: as many as the slots allow.
        timeline: told of reads.
        names: what it calls a unit.
        poison: fill a slot with NaN bytes before each load (for tests).
    """

    def __init__(
        self,
        layouts: Mapping[int, SlotLayout],
        slot_of: dict[int, int],
        reader: DiskReader,
        depth: int | None,
        timeline: Timeline,
        names: Callable[[int], str] = unit_name,
        poison: bool = False,
    ) -> None:
        sizes = slot_sizes(slot_of, {unit: layouts[unit].nbytes for unit in slot_of})
        super().__init__(
            SlotCache(slot_of, AccessSchedule(()), depth, self._read), [page_aligned(size) for size in sizes]
        )
        self._layouts = layouts
        self._reader = reader
        self._timeline = timeline
        self._names = names
        self._poison = poison

    def _read(self, load: Load) -> None:
        buffer, cache, layout = self.buffers[load.slot], self.cache, self._layouts[load.unit]
        if self._poison:
            buffer.fill_(0xFF)
        reading = self._timeline.transfer(DISK, self._names(load.unit), layout.read_bytes)

        def done(error: BaseException | None) -> None:
            reading.end(whole=error is None and not load.cancelled)
            cache.finished(load, error)

        self._reader.submit(
            ReadJob(
                extents=layout.extents,
                buffer=memoryview(buffer.numpy()),  # type: ignore[arg-type]
                cancelled=lambda: load.cancelled,
                done=done,
                begun=reading.begin,
            )
        )


def slot_sizes(slot_of: Mapping[int, int], nbytes: Mapping[int, int]) -> list[int]:
    """Bytes of each slot: of the largest unit that lives there."""
    sizes = [0] * (max(slot_of.values(), default=-1) + 1)
    for unit, slot in slot_of.items():
        sizes[slot] = max(sizes[slot], nbytes[unit])
    return sizes


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
