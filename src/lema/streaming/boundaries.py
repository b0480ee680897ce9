"""Where boundary activations live: a layer's input, kept from its forward to its backward.

A store knows tensors, the order they came in and a device's streams; it knows nothing of layers, graphs
or why a tensor is wanted again.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..errors import StreamingError
from ..storage.views import copy_to_own_pages
from .arena import Area, Arena
from .backend import DeviceBackend, Event

_numbers = itertools.count(1)
"""Of handles, over all stores, so that no store takes another's for its own."""


@dataclass(eq=False)
class Handle:
    """What `put` returns. Dropping the last reference gives the memory back, whether or not it was used."""

    unit: int
    number: int = field(default_factory=lambda: next(_numbers))


class BoundaryStore(Protocol):
    """Keeps inputs of layers until their backward, each for one node of an autograd graph."""

    def save(self, ctx: Any, unit: int, hidden: torch.Tensor) -> None:
        """Keep a tensor of any shape, strides and type, as it is when the compute stream comes here."""

    def saved(self, ctx: Any) -> AbstractContextManager[torch.Tensor]:
        """The tensor, every bit of it, for the calling thread's compute stream inside the block.

        Raises:
            StreamingError: it was given back already, or too many are in use.
            RuntimeError: autograd's, if it kept the tensor itself and that was freed or changed meanwhile.
        """

    def close(self) -> None:
        """Wait for what is under way and give all memory back."""


class KeptBoundaries:
    """Boundaries that stay where they are, as tensors that autograd saves.

    Args:
        copied: on CPU, as copies in pages of their own.
    """

    def __init__(self, copied: bool = True) -> None:
        self._copied = copied

    def save(self, ctx: Any, unit: int, hidden: torch.Tensor) -> None:
        """See `BoundaryStore.save`; what is not copied must not be changed in place before the backward."""
        ctx.save_for_backward(copy_to_own_pages(hidden) if self._copied else hidden)

    @contextlib.contextmanager
    def saved(self, ctx: Any) -> Iterator[torch.Tensor]:
        """See `BoundaryStore.saved`."""
        yield ctx.saved_tensors[0]

    def close(self) -> None:
        """Nothing: the graphs hold what there is."""


class OffloadedBoundaries:
    """Boundaries that go to pinned host memory and come back ahead of need.

    Layout: two device buffers ("stages") as large as the largest boundary so far, and a pinned host area
    a live handle. A stage holds the bytes of at most one handle: those put last, or those fetched for a
    backward. Areas lie in chunks of `areas`, each chunk pinned once; a boundary takes the smallest free
    area it fits. Both grow when a larger boundary comes, never in the steady state.

    Mechanics: `put` lets the compute stream copy the tensor into a stage, so that its own memory is free
    in the order of that stream, and one copy stream carry the stage to an area. `get` finds the bytes in
    a stage, or lets another copy stream fetch them there; the compute stream waits for that, and the
    boundary put before this one starts to come into the other stage, for in a backward it is next. Five
    events order all this, each wait enqueued after the record it is meant for, and by threads that hold
    the lock:

        stage.written  its bytes are there     -> who reads it: compute, or the stream out; who overwrites it
        stage.copied   it has been carried out -> who overwrites it: compute, or the stream back
        stage.free     compute has come here   -> the stream back
        area.stored    its bytes are there     -> the stream back
        area.fetched   it has been read        -> the stream out, for the next boundary in this area

    `free` is recorded at `release` and once more right before a stage is overwritten, so that whatever
    was enqueued up to then reads what it should. From then on saved references raise: what `get` returned
    has its autograd version raised. No call waits for the device, except to grow, to close, and where host
    memory could not be pinned.

    Args:
        backend: of the device the tensors are on.
        areas: handles live at once in the steady state, usually the number of offloaded layers. More may be:
            they cost another chunk of as many areas.
    """

    def __init__(self, backend: DeviceBackend, areas: int) -> None:
        self.late_fetches = 0
        """How often `get` found nothing fetched ahead."""
        self.copied_bytes = 0
        """To the host and back."""
        self._backend = backend
        self._out = backend.copy_stream("boundaries out")
        self._back = backend.copy_stream("boundaries back")
        self._arena = Arena(backend, areas)
        self._stages = [
            _Stage(backend.device_buffer(0), backend.event(), backend.event(), backend.event()) for _ in range(2)
        ]
        self._live: dict[int, _Boundary] = {}
        self._dropped: deque[int] = deque()
        self._turns = itertools.count(1)
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, _shut_down, self._stages, self._arena)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, pinned where that was granted."""
        return self._arena.nbytes

    @property
    def device_bytes(self) -> int:
        """Bytes of both stages."""
        return sum(stage.memory.numel() for stage in self._stages)

    def save(self, ctx: Any, unit: int, hidden: torch.Tensor) -> None:
        """See `BoundaryStore.save`."""
        ctx.handle = self.put(unit, hidden)

    @contextlib.contextmanager
    def saved(self, ctx: Any) -> Iterator[torch.Tensor]:
        """See `BoundaryStore.saved`."""
        try:
            yield self.get(ctx.handle)
        finally:
            self.release(ctx.handle)

    def put(self, unit: int, hidden: torch.Tensor) -> Handle:
        """Copy a tensor away; its memory may be reused or changed on the compute stream from here on.

        Raises:
            StreamingError: it is on another device, both stages are in use, or the store is closed.
        """
        with self._lock:
            self._begin()
            if hidden.device != self._stages[0].memory.device:
                raise StreamingError(
                    f"the input of layer {unit} is on {hidden.device}, boundaries go through "
                    f"{self._stages[0].memory.device}"
                )
            form = _Form.of(hidden)
            for each in self._stages:  # both, or the first backward would find one too small
                if not each.in_use:
                    self._enlarge(each, form.nbytes)
            stage = self._spare(form.nbytes)
            if stage is None:
                raise _all_in_use(unit)
            handle = Handle(unit)
            weakref.finalize(handle, self._dropped.append, handle.number).atexit = False
            boundary = self._live[handle.number] = _Boundary(handle.number, form, self._arena.take(form.nbytes))
            self._fill(stage, hidden.detach(), form)
            self._carry_out(stage, boundary)
            self._backend.ready_for_compute()
            return handle

    def get(self, handle: Handle) -> torch.Tensor:
        """The tensor in a stage, for the calling thread's compute stream until `release`. In any order.

        It is overwritten some time after `release`. At most two may be in use, with one the next is fetched.
        """
        with self._lock:
            self._begin()
            boundary = self._boundary(handle)
            stage = self._holding(boundary.number)
            if stage is None:
                stage = self._spare(boundary.form.nbytes)
                if stage is None:
                    raise _all_in_use(handle.unit)
                self.late_fetches += 1
                self._fetch(stage, boundary)
            stage.in_use = True
            self._backend.compute_stream().wait_event(stage.written)
            if stage.view is None:
                stage.view = boundary.form.view(stage.memory)
            self._fetch_ahead(boundary.number)
            self._backend.ready_for_compute()
            return stage.view

    def release(self, handle: Handle, keep: bool = False) -> None:
        """Let the stage be overwritten when the compute stream has come here; unless `keep`, its host area as well."""
        with self._lock:
            self._begin()
            number = self._boundary(handle).number
            stage = self._holding(number)
            if stage is not None and stage.in_use:
                stage.in_use = False
                self._backend.compute_stream().record_event(stage.free)
            if not keep:
                self._forget(number)

    def close(self) -> None:
        """Wait for copies under way, unpin and free; later calls raise."""
        with self._lock:
            self._finalizer()

    # -- moving ----------------------------------------------------------------------------------

    def _fill(self, stage: _Stage, hidden: torch.Tensor, form: _Form) -> None:
        compute = self._backend.compute_stream()
        self._overwrite(stage)
        for event in (stage.written, stage.copied):
            compute.wait_event(event)
        self._backend.copy(form.view(stage.memory), hidden, compute)
        compute.record_event(stage.written)

    def _carry_out(self, stage: _Stage, boundary: _Boundary) -> None:
        area, nbytes = boundary.area, boundary.form.nbytes
        for event in (stage.written, area.fetched):
            self._out.wait_event(event)
        self._backend.copy(area.memory[:nbytes], stage.memory[:nbytes], self._out)
        for event in (stage.copied, area.stored):
            self._out.record_event(event)
        self.copied_bytes += nbytes
        stage.holds = boundary.number

    def _fetch(self, stage: _Stage, boundary: _Boundary) -> None:
        area, nbytes = boundary.area, boundary.form.nbytes
        self._back.wait_event(stage.free)
        self._overwrite(stage)
        self._backend.compute_stream().record_event(stage.free)
        for event in (stage.free, stage.written, stage.copied, area.stored):
            self._back.wait_event(event)
        self._backend.copy(stage.memory[:nbytes], area.memory[:nbytes], self._back)
        for event in (stage.written, area.fetched):
            self._back.record_event(event)
        self.copied_bytes += nbytes
        stage.holds = boundary.number

    def _fetch_ahead(self, number: int) -> None:
        """Start to fetch what will be got after this one: the one put before it, else the one put last."""
        others = [other for other in self._live if other != number]
        if not others:
            return
        following = max((other for other in others if other < number), default=max(others))
        if self._holding(following) is None:
            boundary = self._live[following]
            stage = self._spare(boundary.form.nbytes)
            if stage is not None:
                self._fetch(stage, boundary)

    def _overwrite(self, stage: _Stage) -> None:
        """Called before the copy that overwrites a stage is enqueued."""
        if stage.view is not None:
            torch.autograd.graph.increment_version(stage.view)
        stage.view, stage.holds, stage.turn = None, None, next(self._turns)

    # -- who has what ----------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._finalizer.alive:
            raise StreamingError("the store of boundary activations is closed")
        while self._dropped:
            self._forget(self._dropped.popleft())

    def _boundary(self, handle: Handle) -> _Boundary:
        if handle.number not in self._live:
            raise _gone(handle)
        return self._live[handle.number]

    def _forget(self, number: int) -> None:
        boundary = self._live.pop(number, None)
        if boundary is None:
            return
        self._arena.give(boundary.area)
        stage = self._holding(number)
        if stage is not None:
            stage.in_use = False

    def _holding(self, number: int) -> _Stage | None:
        return next((stage for stage in self._stages if stage.holds == number), None)

    def _spare(self, nbytes: int) -> _Stage | None:
        """A stage nobody uses, large enough: first one whose boundary is gone, then the one written longest ago."""
        spare = [stage for stage in self._stages if not stage.in_use]
        if not spare:
            return None
        stage = min(spare, key=lambda stage: (stage.holds in self._live, stage.turn))
        self._enlarge(stage, nbytes)
        return stage

    def _enlarge(self, stage: _Stage, nbytes: int) -> None:
        if stage.memory.numel() >= nbytes:
            return
        self._overwrite(stage)
        stage.empty()
        stage.memory = self._backend.device_buffer(nbytes)


@dataclass(frozen=True, slots=True)
class _Form:
    """Type, shape and strides of a tensor without gaps, and its size in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Form:
        """The form of a copy: the tensor's own strides unless it has gaps or overlaps, as `empty_like` has it."""
        strides = torch.empty_like(tensor, device="meta").stride()
        return cls(tensor.dtype, tuple(tensor.shape), strides, tensor.numel() * tensor.dtype.itemsize)

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """A tensor of this form at the start of uint8 `[n]`, with a version counter of its own."""
        assert memory.storage_offset() % self.dtype.itemsize == 0, "a view must start at a multiple of its item size"
        offset = memory.storage_offset() // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=memory.device)
        return view.set_(memory.untyped_storage(), offset, self.shape, self.strides)


@dataclass(eq=False, slots=True)
class _Stage:
    """A device buffer, whose bytes it holds, and what `get` made of them."""

    memory: torch.Tensor
    written: Event
    copied: Event
    free: Event
    holds: int | None = None
    view: torch.Tensor | None = None
    in_use: bool = False
    turn: int = 0

    def empty(self) -> None:
        """Let go of the memory when no copy stream reads or writes it any more."""
        self.written.synchronize()
        self.copied.synchronize()
        self.memory, self.view, self.holds = torch.empty_like(self.memory[:0]), None, None


@dataclass(frozen=True, slots=True)
class _Boundary:
    """What a live handle stands for."""

    number: int
    form: _Form
    area: Area


def _shut_down(stages: Sequence[_Stage], arena: Arena) -> None:
    for stage in stages:
        stage.empty()
    arena.close()


def _gone(handle: Handle) -> StreamingError:
    return StreamingError(
        f"the input of layer {handle.unit} was given back after its backward: a second backward through the same graph "
        "needs retain_graph=True in the first"
    )


def _all_in_use(unit: int) -> StreamingError:
    return StreamingError(f"the input of layer {unit} has no place on the device: release one that is in use first")
