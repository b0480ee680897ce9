"""Typed views of raw memory, and parameters made of file tensors.

It knows storages, offsets and pieces; it knows nothing of modules, slots' life or schedules.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import BindingError
from .codecs import Run
from .index import GlobalBinaryIndex
from .layout import PAGE, ParameterSource, ScratchView, align_up

_HUGE_FROM = 8 << 20


def page_aligned(nbytes: int) -> torch.Tensor:
    """Zeroed anonymous memory as uint8 `[nbytes]`, rounded up to whole pages, starting on one.

    From 8 MiB on huge pages are asked for: direct reads into them are faster, as fewer pages are pinned.
    """
    size = max(align_up(nbytes, PAGE), PAGE)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def evict_pages(buffer: torch.Tensor) -> None:
    """Give the pages of a `page_aligned` buffer back to the system; it reads as zeros until it is written again."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.numel()), mmap.MADV_DONTNEED)


def keep_from_children(buffer: torch.Tensor, wanted: bool = True) -> None:
    """Leave the pages of a `page_aligned` buffer out of forked children, or (False) in them again.

    A page shared with a child is copied when its owner writes to it, and the owner goes on with the copy: a device
    that was told the old page's address would read what nobody writes any more.
    """
    if sys.platform == "linux":
        advice = mmap.MADV_DONTFORK if wanted else mmap.MADV_DOFORK
        ctypes.CDLL(None).madvise(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.numel()), advice)


def copy_to_own_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor in pages of its own, given back to the system with the last reference.

    For what outlives a layer: kept on the heap among short-lived activations it would hold the heap's
    free space apart, which costs several times its own size in resident memory. Other devices and
    tensors smaller than a page's worth are returned as they are.
    """
    if tensor.device.type != "cpu" or tensor.numel() * tensor.dtype.itemsize < 16 * PAGE:
        return tensor
    copy = typed_view(page_aligned(tensor.numel() * tensor.dtype.itemsize), 0, tensor.dtype, tensor.shape)
    return copy.copy_(tensor)


def typed_view(buffer: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over bytes of `buffer`, with a version counter of its own.

    Views made by slicing share one counter, so that a write to one neighbour would invalidate all;
    `set_` makes a tensor that shares only the storage.

    Args:
        buffer: uint8 `[n]`.
        offset: bytes from the buffer's start, divisible by the item size.
    """
    start = buffer.storage_offset() + offset
    if start % dtype.itemsize:
        raise BindingError(f"a view of {dtype} must start at a multiple of {dtype.itemsize} bytes, not at byte {start}")
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    tensor = torch.empty(0, dtype=dtype, device=buffer.device)
    tensor.set_(buffer.untyped_storage(), start // dtype.itemsize, tuple(shape), tuple(strides))
    return tensor


class Decoder:
    """Makes a unit's scratch parameters from what its slot holds; what is stored is checked before the first time."""

    def __init__(self, slot: torch.Tensor, scratch: torch.Tensor, views: Sequence[ScratchView]) -> None:
        self._parts = [
            (
                view.source.codec,
                [_Stored.at(slot, offset, run) for run, offset in view.runs],
                typed_view(scratch, view.offset, view.source.dtype, view.source.shape),
            )
            for view in views
        ]
        self._checked = False

    def __call__(self) -> None:
        """Decode every parameter; one call a use.

        Raises:
            WeightsFormatError: what is stored cannot be what its format says.
        """
        for codec, stored, out in self._parts:
            values = [run.values() for run in stored]
            if not self._checked:
                codec.check(values)
            codec.decode(values, out)
        self._checked = True


@dataclass(frozen=True, slots=True)
class _Stored:
    """Elements in a slot: a typed view, or bytes where the type may not start at their address."""

    data: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def at(cls, slot: torch.Tensor, offset: int, run: Run) -> _Stored:
        dtype = run.record.dtype
        if (slot.storage_offset() + offset) % dtype.itemsize == 0:
            return cls(typed_view(slot, offset, dtype, (run.count,)), dtype)
        return cls(typed_view(slot, offset, torch.uint8, (run.count * dtype.itemsize,)), dtype)

    def values(self) -> torch.Tensor:
        return self.data if self.data.dtype == self.dtype else self.data.clone().view(self.dtype)


def materialize(gbi: GlobalBinaryIndex, source: ParameterSource) -> torch.Tensor:
    """The parameter as a tensor with memory of its own, decoded from the mapped file.

    Raises:
        WeightsFormatError: what is stored cannot be what its format says.
    """
    result = torch.empty(source.shape, dtype=source.dtype)
    stored = [_mapped(gbi, run) for run in source.codec.runs]
    source.codec.check(stored)
    source.codec.decode(stored, result)
    return result


def _mapped(gbi: GlobalBinaryIndex, run: Run) -> torch.Tensor:
    return gbi.view(run.record.name).reshape(-1)[run.source : run.source + run.count]


def mapped_or_materialized(gbi: GlobalBinaryIndex, source: ParameterSource) -> torch.Tensor:
    """A view of the mapped file where the stored bytes are the parameter, else a tensor of its own."""
    if not source.plain:
        return materialize(gbi, source)
    return _mapped(gbi, source.codec.runs[0]).view(source.shape)
