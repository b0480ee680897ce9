"""Which bytes of which file make up a unit, and where they lie in a slot.

It knows tensors' records, shapes and offsets; it reads nothing and knows nothing of layers or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .codecs import Codec, Piece, Placement, Run
from .index import TensorRecord

PAGE = 4096
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

    Layout: the unit's file tensors in file order, touching ones merged into extents, each extent at
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
        self.extents = _merge_extents(run.record for source in sources for run in source.codec.runs)
        self.nbytes = align_up(max((e.slot_offset + e.nbytes for e in self.extents), default=0), PAGE)
        self.read_bytes = sum(extent.nbytes for extent in self.extents)
        place = {r: e.slot_offset + r.offset - e.offset for e in self.extents for r in e.records}
        self.moves: tuple[Move, ...] = ()
        if moved:
            place, self.moves = _align(place)
        self.direct: list[SlotView] = []
        self.decoded: list[ScratchView] = []
        scratch = 0
        for source in self.sources:
            runs = tuple(
                (run, place.get(run.record, 0) + run.source * run.record.dtype.itemsize) for run in source.codec.runs
            )
            if source.plain and not packed and not (moved and runs[0][1] % ALIGNMENT):
                self.direct.append(SlotView(source, runs[0][1]))
            else:
                scratch = scratch if packed else align_up(scratch, ALIGNMENT)
                self.decoded.append(ScratchView(source, scratch, runs))
                scratch += source.nbytes
        self.scratch_nbytes = scratch


def _align(place: Mapping[TensorRecord, int]) -> tuple[dict[TensorRecord, int], tuple[Move, ...]]:
    """Aligned places for tensors that lie at `place`, in its order, and the fewest moves there."""
    aligned: dict[TensorRecord, int] = {}
    moves: list[Move] = []
    end = 0
    for record, source in place.items():
        aligned[record] = target = align_up(end, ALIGNMENT)
        end = target + record.nbytes
        last = moves[-1] if moves else None
        if last is not None and (last.source + last.nbytes, last.target + last.nbytes) == (source, target):
            moves[-1] = Move(last.source, last.target, last.nbytes + record.nbytes)
        else:
            moves.append(Move(source, target, record.nbytes))
    return aligned, tuple(moves)


def _merge_extents(records: Iterable[TensorRecord]) -> tuple[Extent, ...]:
    unique = sorted({r for r in records if r.nbytes}, key=lambda r: (str(r.file), r.offset))
    groups: list[list[TensorRecord]] = []
    for record in unique:
        last = groups[-1][-1] if groups else None
        if last is not None and last.file == record.file and last.offset + last.nbytes == record.offset:
            groups[-1].append(record)
        else:
            groups.append([record])
    extents = []
    page = 0
    for group in groups:
        start, end = group[0].offset, group[-1].offset + group[-1].nbytes
        extents.append(Extent(group[0].file, start, end - start, page + start % PAGE, tuple(group)))
        page += align_up(start % PAGE + end - start, PAGE)
    return tuple(extents)
