"""Which bytes of which file make up a unit, and where they lie in a slot.

It knows tensors' records, shapes and offsets; it reads nothing and knows nothing of layers or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .codecs import Codec, Piece, Placement, Run
from .index import TensorRecord

PAGE = 4096
_GAP = PAGE
"""Bytes between segments of a unit with codes up to which they are read as one: what lies there are tables that no step
needs, and a read for each segment would cost more."""
ALIGNMENT = 256
"""Of parameters in device memory and in scratch: what cudaMalloc gives, and the fastest kernels want 16 to 128."""


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """How one parameter (or persistent buffer) is made from file tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """It is computed with."""
    codec: Codec

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Runs of elements it is put together from; none where it is decoded from codes."""
        return self.codec.pieces if isinstance(self.codec, Placement) else ()

    @property
    def plain(self) -> bool:
        """Whether the stored bytes of one file tensor are the parameter, so that a view of them will do."""
        return self.codec.is_identity(self.dtype, self.numel)


def whole_tensor(name: str, record: TensorRecord, dtype: torch.dtype | None = None) -> ParameterSource:
    """The source of a parameter that is exactly one file tensor, in the file's type unless another is asked."""
    piece = Piece(record, 0, 0, math.prod(record.shape))
    return ParameterSource(name, record.shape, dtype or record.dtype, Placement((piece,)))


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of file bytes read as one, and where in the slot its first byte goes.

    `slot_offset` is congruent to `offset` modulo a page, so the enclosing aligned range can be read
    directly into the slot.
    """

    file: Path
    offset: int
    nbytes: int
    slot_offset: int
    records: tuple[TensorRecord, ...]

    def record_at(self, offset: int) -> TensorRecord:
        """The tensor that holds the file byte at `offset`, or the nearest one before it."""
        return next((r for r in reversed(self.records) if r.offset <= offset), self.records[0])


@dataclass(frozen=True, slots=True)
class SlotView:
    """A parameter that is a typed view of stored bytes at a byte offset of the slot."""

    source: ParameterSource
    offset: int


@dataclass(frozen=True, slots=True)
class ScratchView:
    """A parameter made from stored bytes at each use: decoded into scratch at a byte offset.

    `runs` pairs each run of its codec with the byte offset of its first element in the slot.
    """

    source: ParameterSource
    offset: int
    runs: tuple[tuple[Run, int], ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A run of bytes that goes from a host slot to a device slot as one: offsets in both, in bytes."""

    source: int
    target: int
    nbytes: int


class SlotLayout:
    """Where everything of one unit lies.

    Layout: what its codecs ask of the unit's file tensors, in file order, touching ones merged into extents, each at
    its own page of the slot with the same offset in the page as in the file. Parameters whose stored
    bytes are what the computation wants are views of the slot; the others (another type, several file
    tensors, codes, an odd offset) have a place in the scratch that all units share and are decoded there.

    Where the unit is computed in another slot than the one it is read into, its tensors lie there one after
    the other, each at a multiple of 256 bytes whatever its offset in the file, and `moves` says how they get there.

    Args:
        sources: parameters of the unit in the order the module wants them.
        packed: put every parameter into scratch, one after the other without gaps (a flat buffer).
        moved: the unit is computed in a device slot.
    """

    def __init__(self, sources: Sequence[ParameterSource], packed: bool = False, moved: bool = False) -> None:
        self.sources = tuple(sources)
        coded = any(not isinstance(source.codec, Placement) for source in sources)
        segments = _segments(run for source in sources for run in source.codec.runs)
        self.extents, place = _merge(segments, _GAP if coded else 0)
        self.nbytes = align_up(max((e.slot_offset + e.nbytes for e in self.extents), default=0), PAGE)
        self.read_bytes = sum(extent.nbytes for extent in self.extents)
        self.moves: tuple[Move, ...] = ()
        if moved:
            place, self.moves = _align(place)
        self.direct: list[SlotView] = []
        self.decoded: list[ScratchView] = []
        scratch = 0
        for source in self.sources:
            runs = tuple((run, _offset(run, place)) for run in source.codec.runs)
            if source.plain and not packed and not (moved and runs[0][1] % ALIGNMENT):
                self.direct.append(SlotView(source, runs[0][1]))
            else:
                scratch = scratch if packed else align_up(scratch, ALIGNMENT)
                self.decoded.append(ScratchView(source, scratch, runs))
                scratch += source.nbytes
        self.scratch_nbytes = scratch


@dataclass(frozen=True, slots=True)
class _Segment:
    """Bytes `start` to `end` of a file, all of one tensor."""

    record: TensorRecord
    start: int
    end: int


_Places = dict[TensorRecord, list[tuple[_Segment, int]]]
"""What is there of each tensor, and its byte offset in a slot."""


def _segments(runs: Iterable[Run]) -> list[_Segment]:
    """The bytes of these runs, in file order; what touches or overlaps within a tensor is one segment."""
    wanted = {_Segment(run.record, *_bytes(run)) for run in runs if run.count and run.record.nbytes}
    found: list[_Segment] = []
    for segment in sorted(wanted, key=lambda s: (str(s.record.file), s.start, s.end)):
        last = found[-1] if found else None
        if last is not None and last.record == segment.record and segment.start <= last.end:
            found[-1] = _Segment(last.record, last.start, max(last.end, segment.end))
        else:
            found.append(segment)
    return found


def _bytes(run: Run) -> tuple[int, int]:
    start = run.record.offset + run.source * run.record.dtype.itemsize
    return start, start + run.count * run.record.dtype.itemsize


def _offset(run: Run, places: _Places) -> int:
    """Of a run's first element in the slot; 0 for one without elements."""
    start, end = _bytes(run)
    found = places.get(run.record, ())
    if not run.count:
        return 0
    return next(at + start - segment.start for segment, at in found if segment.start <= start < end <= segment.end)


def _merge(segments: Sequence[_Segment], gap: int) -> tuple[tuple[Extent, ...], _Places]:
    groups: list[list[_Segment]] = []
    for segment in segments:
        last = groups[-1][-1] if groups else None
        if last is not None and last.record.file == segment.record.file and 0 <= segment.start - last.end <= gap:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    extents = []
    places: _Places = {}
    page = 0
    for group in groups:
        start, end = group[0].start, group[-1].end
        slot_offset = page + start % PAGE
        for segment in group:
            places.setdefault(segment.record, []).append((segment, slot_offset + segment.start - start))
        records = tuple(segment.record for segment in group)
        extents.append(Extent(records[0].file, start, end - start, slot_offset, records))
        page += align_up(start % PAGE + end - start, PAGE)
    return tuple(extents), places


def _align(places: _Places) -> tuple[_Places, tuple[Move, ...]]:
    """Aligned places for segments that lie at `places`, in file order, and the fewest moves there."""
    aligned: _Places = {}
    moves: list[Move] = []
    end = 0
    for segment, source in sorted((one for found in places.values() for one in found), key=lambda one: one[1]):
        target, nbytes = align_up(end, ALIGNMENT), segment.end - segment.start
        aligned.setdefault(segment.record, []).append((segment, target))
        end = target + nbytes
        last = moves[-1] if moves else None
        if last is not None and (last.source + last.nbytes, last.target + last.nbytes) == (source, target):
            moves[-1] = Move(last.source, last.target, last.nbytes + nbytes)
        else:
            moves.append(Move(source, target, nbytes))
    return aligned, tuple(moves)
