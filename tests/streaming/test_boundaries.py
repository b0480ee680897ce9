"""Boundary activations that go away and come back: every bit, in any order, and every guard is needed.

One driver puts tensors that a late compute stream makes and overwrites, gets them back in orders of its own, and
reads them in that stream, long after the call. It must find nothing wrong with the store as it is, and something
wrong with every store from which one guard was taken.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lema.errors import StreamingError
from lema.storage.layout import PAGE, align_up
from lema.storage.views import page_aligned
from lema.streaming import arena as arena_module
from lema.streaming.accelerator import StagedCopier
from lema.streaming.boundaries import BoundaryStore, Handle, KeptBoundaries, OffloadedBoundaries
from replayed import Replayed, layer
from simulated import SimulatedDevice, SimulatedEvent, SimulatedStream
from simulated_tiers import Shape, drive, hold

pytestmark = pytest.mark.timeout(60)

PAUSE = 0.0008


# --- the driver -------------------------------------------------------------------------------------------

FORMS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x,
    lambda x: x.transpose(0, 1),
    lambda x: x[:, ::2],
    lambda x: x[1:, 1:],
    lambda x: x[:1].expand(5, -1),
    lambda x: x[:0],
    lambda x: x.reshape(-1)[3].clone(),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool, torch.complex64]


@dataclass(frozen=True)
class Walk:
    """Everything a run is drawn from; the seed draws the rest."""

    seed: int
    areas: int = 3
    longest: int = 40
    refused: bool = False
    pause: float = PAUSE


class Run:
    """A store on a late device; `wrong` collects whatever the compute stream read that was not the tensor."""

    def __init__(self, walk: Walk, store: Callable[..., OffloadedBoundaries] = OffloadedBoundaries) -> None:
        self.walk = walk
        self.draw = random.Random(walk.seed)
        self.device = SimulatedDevice(
            walk.seed, walk.pause, blocking=False, pinning_refused=walk.refused, staging_bytes=256
        )
        self.store = store(self.device, walk.areas)
        self.live: dict[Handle, torch.Tensor] = {}
        self.used: dict[Handle, torch.Tensor] = {}
        self.wrong: list[str] = []

    def put(self) -> None:
        """The compute stream makes a tensor, the store keeps it, the compute stream writes over it."""
        rows, columns = self.draw.randint(2, self.walk.longest), self.draw.randint(4, 30)
        content = torch.frombuffer(bytearray(self.draw.randbytes(rows * columns * 8)), dtype=torch.uint8)
        dtype = self.draw.choice(DTYPES)
        if dtype is torch.bool:
            values = (content[: rows * columns] > 99).view(rows, columns)
        else:
            values = content[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
        form = self.draw.choice(FORMS)
        made = torch.zeros_like(values)
        hidden = form(made)
        compute = self.device.compute_stream()
        if hidden.untyped_storage().data_ptr() == made.untyped_storage().data_ptr():
            self.device.copy(made, values, compute)
        else:
            hidden.copy_(form(values))
        handle = self.store.put(self.draw.randrange(4), hidden)
        self.device.copy(made, torch.zeros_like(values), compute)
        self.live[handle] = form(values)

    def get(self, handle: Handle) -> None:
        expected = self.live[handle]
        found = self.store.get(handle)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        dense, number = torch.empty_like(expected).stride(), handle.number
        assert found.stride() == dense, "a layout other than the one the layer saw may change its bits"

        def use(source: torch.Tensor) -> None:
            if _bytes(source) != _bytes(expected):
                self.wrong.append(f"the tensor of handle {number} came back changed")

        self.used[handle] = found
        for _ in range(self.draw.randint(0, 2)):
            self.device.read(found, use)

    def release(self, handle: Handle, keep: bool) -> None:
        del self.used[handle]
        self.store.release(handle, keep)
        if not keep:
            del self.live[handle]

    def step(self) -> None:
        draw, free = self.draw, [handle for handle in self.live if handle not in self.used]
        choice = draw.random()
        if len(self.used) == 2 or (self.used and choice < 0.5):
            self.release(draw.choice(list(self.used)), keep=draw.random() < 0.15)
        elif choice < 0.6 and len(self.live) < 9:
            self.put()
        elif free and choice < 0.93:
            self.get(free[-1] if draw.random() < 0.6 else draw.choice(free))
        elif free:
            dropped = draw.choice(list(self.live))
            self.used.pop(dropped, None)
            del self.live[dropped], dropped, free
        if draw.random() < 0.3:
            time.sleep(draw.random() * self.walk.pause)

    def sweeps(self) -> None:
        """Forwards and backwards as in training; now and then two forwards first, or a graph freed half used."""
        for _ in range(self.draw.randint(1, 2)):
            for _ in range(self.draw.randint(1, 4)):
                self.put()
        if self.draw.random() < 0.2:
            self.live.clear()
        while self.live:
            *_, handle = self.live
            self.get(handle)
            if self.draw.random() < 0.2:
                for next_handle in list(self.live)[-2:-1]:  # what is being fetched ahead
                    del self.live[next_handle], next_handle
                self.release(handle, keep=False)
                self.put()
            else:
                self.release(handle, keep=False)

    def go(self) -> list[str]:
        try:
            for _ in range(3):
                for _ in range(self.draw.randint(0, 25)):
                    self.step()
                for handle in list(self.used):
                    self.release(handle, keep=True)
                self.sweeps()
        finally:
            self.device.compute_stream().drain()
            self.store.close()
            for stream in (*self.device._streams.values(), self.device.compute_stream()):
                stream.close()
        if self.device.pinned_bytes:
            self.wrong.append("memory stayed pinned")
        return self.wrong + self.device.faults


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- the store as it is -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Walk,
        seed=st.integers(0, 2**20),
        areas=st.integers(1, 5),
        longest=st.sampled_from([4, 40, 400]),
        refused=st.sampled_from([False, False, True]),
        pause=st.sampled_from([0.0, PAUSE]),
    )
)
def test_every_tensor_comes_back_as_it_was(walk: Walk) -> None:
    assert Run(walk).go() == []


def device_and_store(areas: int = 4, **options: Any) -> tuple[SimulatedDevice, OffloadedBoundaries]:
    device = SimulatedDevice(5, PAUSE, **options)
    return device, OffloadedBoundaries(device, areas)


@pytest.fixture
def store() -> Iterator[OffloadedBoundaries]:
    device, store = device_and_store()
    yield store
    store.close()
    device.close()


def tensor(number: int, *shape: int) -> torch.Tensor:
    return torch.full(shape or (3, 5), float(number))


def use(store: OffloadedBoundaries, handle: Handle, expected: torch.Tensor, keep: bool = False) -> None:
    assert torch.equal(store.get(handle), expected)
    store.release(handle, keep)


def test_a_backward_finds_every_boundary_fetched_ahead(store: OffloadedBoundaries) -> None:
    for _ in range(3):
        handles = [store.put(unit, tensor(unit)) for unit in range(4)]
        for unit in reversed(range(4)):
            use(store, handles[unit], tensor(unit))
    assert store.late_fetches == 0
    stays = 2  # the last two of a forward are still in their stages
    assert store.copied_bytes == 3 * (4 + 4 - stays) * 60


def test_two_forwards_first_cost_one_late_fetch(store: OffloadedBoundaries) -> None:
    handles = [[store.put(unit, tensor(10 * batch + unit)) for unit in range(4)] for batch in range(2)]
    for batch in range(2):
        for unit in reversed(range(4)):
            use(store, handles[batch][unit], tensor(10 * batch + unit))
    assert store.late_fetches == 1


def test_the_steady_state_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    device, store = device_and_store()
    device_buffer, event = device.device_buffer, device.event
    for name, real in (("device_buffer", device_buffer), ("event", event)):
        monkeypatch.setattr(device, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    pages = partial(lambda *args: (calls.append("pages"), page_aligned(*args))[1])
    monkeypatch.setattr(arena_module, "page_aligned", pages)

    def sweep(rows: int) -> None:
        handles = [store.put(unit, tensor(unit, rows, 700)) for unit in range(4)]
        for unit in reversed(range(4)):
            use(store, handles[unit], tensor(unit, rows, 700))

    sweep(9)
    assert device.pins == 1 and device.pinned_bytes == store.host_bytes == 4 * align_up(9 * 700 * 4, PAGE)
    assert store.device_bytes == 2 * 9 * 700 * 4
    calls.clear()
    for rows in (9, 3, 9, 1):
        sweep(rows)
    assert calls == [], "smaller batches fit where larger ones were"
    sweep(20)
    assert sorted(set(calls)) == ["device_buffer", "event", "pages"]
    assert device.pins == 2 and device.pinned_bytes == store.host_bytes == 4 * align_up(20 * 700 * 4, PAGE)
    assert store.device_bytes == 2 * 20 * 700 * 4
    calls.clear()
    sweep(20)
    assert calls == []
    store.close()
    assert device.pinned_bytes == store.host_bytes == store.device_bytes == 0
    device.close()


def test_a_handle_that_is_dropped_gives_its_memory_back(store: OffloadedBoundaries) -> None:
    for number in range(6):
        handles = [store.put(unit, tensor(unit)) for unit in range(4)]
        if number % 2:
            store.get(handles[3])
        del handles
    assert store.host_bytes == 4 * PAGE


def test_a_larger_batch_leaves_live_boundaries_alone(store: OffloadedBoundaries) -> None:
    small = [store.put(unit, tensor(unit)) for unit in range(3)]
    view = store.get(small[0])
    large = [store.put(unit, tensor(unit + 10, 80, 80)) for unit in range(3)]
    assert torch.equal(view, tensor(0))
    store.release(small[0], keep=True)
    for unit in (2, 0, 1):
        use(store, small[unit], tensor(unit))
        use(store, large[unit], tensor(unit + 10, 80, 80))


def test_a_boundary_that_is_kept_can_be_got_again(store: OffloadedBoundaries) -> None:
    handles = [store.put(unit, tensor(unit)) for unit in range(4)]
    for keep in (True, True, False):
        for unit in reversed(range(4)):
            use(store, handles[unit], tensor(unit), keep)
    with pytest.raises(StreamingError, match="retain_graph"):
        store.get(handles[0])


def test_a_saved_reference_to_a_stage_that_was_overwritten_raises(store: OffloadedBoundaries) -> None:
    handles = [store.put(unit, tensor(unit)) for unit in range(4)]
    weight = torch.ones(3, 5, requires_grad=True)
    view = store.get(handles[3])
    still_there, gone = (weight * view).sum(), (weight * view[1:].detach().sum() * view).sum()
    store.release(handles[3])
    still_there.backward()
    assert torch.equal(weight.grad, tensor(3))
    store.get(handles[2])  # and handle 1 comes into the stage of handle 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gone.backward()


def test_misuse_is_refused() -> None:
    device, store = device_and_store()
    handles = [store.put(unit, tensor(unit)) for unit in range(4)]
    for handle in handles[:2]:
        store.get(handle)
        assert store.get(handle) is store.get(handle)
    for wrong in (lambda: store.get(handles[2]), lambda: store.put(9, tensor(9))):
        with pytest.raises(StreamingError, match="in use"):
            wrong()
    store.release(handles[0])
    for wrong in (lambda: store.get(handles[0]), lambda: store.release(handles[0])):
        with pytest.raises(StreamingError, match="layer 0"):
            wrong()
    use(store, handles[2], tensor(2))
    with pytest.raises(StreamingError, match="meta"):
        store.put(1, torch.empty(3, device="meta"))
    with pytest.raises(StreamingError):
        OffloadedBoundaries(device, 1).get(handles[3])
    store.close()
    store.close()
    for wrong in (lambda: store.get(handles[3]), lambda: store.put(1, tensor(1))):
        with pytest.raises(StreamingError, match="closed"):
            wrong()
    device.close()


def test_a_forgotten_store_unpins() -> None:
    device, store = device_and_store()
    handle = store.put(0, tensor(0))
    assert device.pinned_bytes
    del store
    gc.collect()
    assert device.pinned_bytes == 0 and handle.unit == 0
    device.close()


def test_a_device_that_hangs_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulated._LONGEST_WAIT", 0.05)
    event = SimulatedEvent()
    device = SimulatedDevice()
    device.compute_stream().enqueue(lambda: time.sleep(0.5))
    device.compute_stream().record_event(event)
    with pytest.raises(StreamingError, match="not reached"):
        event.synchronize()


# --- every guard is needed --------------------------------------------------------------------------------


class NeverRecorded(SimulatedEvent):
    """An event whose records are lost."""

    @property
    def last(self) -> None:  # type: ignore[override]
        return None

    @last.setter
    def last(self, value: object) -> None:
        pass


class Without(OffloadedBoundaries):
    """A store of which one event does not work."""

    def __init__(self, device: SimulatedDevice, areas: int, missing: str) -> None:
        super().__init__(device, areas)
        self.missing = missing
        for stage in self._stages:
            if hasattr(stage, missing):
                setattr(stage, missing, NeverRecorded())

    def _carry_out(self, stage: Any, boundary: Any) -> None:
        if hasattr(boundary.area, self.missing):
            setattr(boundary.area, self.missing, NeverRecorded())
        super()._carry_out(stage, boundary)


SEEDS = range(30)


@pytest.mark.parametrize("missing", ["written", "copied", "free"])
def test_a_store_without_this_event_is_caught(missing: str) -> None:
    assert any(Run(Walk(seed, areas=1), partial(Without, missing=missing)).go() for seed in SEEDS)


def test_a_store_with_all_events_is_not_caught_by_the_same_seeds() -> None:
    for seed in SEEDS:
        assert Run(Walk(seed, areas=1)).go() == []


class TwoComputeStreams(SimulatedDevice):
    """A device on which the caller may compute on a second stream."""

    def __init__(self) -> None:
        super().__init__(longest_pause=0.0, blocking=False)
        self.other = self.copy_stream("compute too")
        self.current = self._compute

    def compute_stream(self) -> SimulatedStream:
        return self.current


@pytest.mark.parametrize("missing", ["nothing", "stored"])
def test_a_get_on_another_compute_stream_waits_for_the_host_area(missing: str) -> None:
    device = TwoComputeStreams()
    store = Without(device, 3, missing)
    first = store.put(0, tensor(1))
    store.get(first)
    gate = hold(store._out)
    handles = [store.put(unit, tensor(unit + 1)) for unit in (1, 2)]  # both through the one stage that is left
    device.current = device.other
    store.release(first)
    result = torch.zeros(3, 5)
    device.copy(result, store.get(handles[0]), device.other)
    time.sleep(0.05)
    gate.set()
    device.other.drain()
    assert torch.equal(result, tensor(2)) == (missing == "nothing")
    store.close()
    if missing == "nothing":
        device.close()


@pytest.mark.parametrize("missing", ["nothing", "fetched"])
def test_a_chunk_is_not_freed_under_a_fetch_nobody_waits_for(missing: str) -> None:
    device = SimulatedDevice(longest_pause=0.0, blocking=False)
    store = Without(device, 1, missing)
    fetching, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        if threading.current_thread() is store._back._thread:  # type: ignore[attr-defined]
            fetching.set()
            go_on.wait(5)

    device._sleep = slowly  # type: ignore[method-assign]
    first = store.put(0, tensor(0, 99, 99))
    handles = [store.put(unit, tensor(unit)) for unit in range(3)]
    for unit in (2, 1):
        store.get(handles[unit])
        store.release(handles[unit])
    assert fetching.wait(5)
    handles.clear()
    threading.Timer(0.1, go_on.set).start()
    second = store.put(0, tensor(0, 99, 99))  # needs a chunk of its own, for which small ones go
    assert first.unit == second.unit and store.host_bytes == 2 * align_up(99 * 99 * 4, PAGE)
    store.close()
    assert ("memory was unpinned while it was copied" in device.faults) == (missing == "fetched")


# --- staging ----------------------------------------------------------------------------------------------


class Staging:
    """A staged copier on a late device; buffers far smaller than what is copied."""

    def __init__(self, seed: int, size: int) -> None:
        self.device = SimulatedDevice(seed, PAUSE, blocking=False)
        self.stream = self.device.copy_stream()
        self.events = [self.device.event(), self.device.event()]
        buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
        self.copier = StagedCopier(buffers, self.events, self.device.copy)

    def go(self, rounds: int = 6) -> list[str]:
        draw, wrong = random.Random(1), []
        for _ in range(rounds):
            content = torch.frombuffer(bytearray(draw.randbytes(draw.randint(1, 400))), dtype=torch.uint8)
            host, there = content.clone(), self.device.device_buffer(len(content))
            self.copier.to_device(there, host, self.stream)
            host.zero_()  # read to the end when the call returns
            if draw.random() < 0.5:
                self.copier.to_device(self.device.device_buffer(90), torch.zeros(90, dtype=torch.uint8), self.stream)
            self.copier.to_host(host, there, self.stream)
            if not torch.equal(host, content):
                wrong.append("other bytes arrived")
        self.stream.drain()
        for stream in (self.stream, self.device.compute_stream()):
            stream.close()
        return wrong + self.device.faults


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1, 16, 64, 100, 512]))
def test_staged_copies_are_whole_both_ways(seed: int, size: int) -> None:
    assert Staging(seed, size).go(2 if size == 1 else 6) == []


def test_staging_without_waiting_for_its_buffers_is_caught() -> None:
    def broken(seed: int) -> Staging:
        staging = Staging(seed, 64)
        for event in staging.events:
            event.synchronize = lambda: None  # type: ignore[method-assign]
        return staging

    assert any(broken(seed).go() for seed in range(10))


def test_the_tier_reads_its_units_through_staging_as_well(tmp_path: Path) -> None:
    device: Any = partial(SimulatedDevice, pinning_refused=True, staging_bytes=512)
    for seed in range(8):
        assert drive(tmp_path, Shape(seed, units=6, depth=3), device=device) == []


def test_memory_is_pinned_once_and_not_unpinned_under_a_copy() -> None:
    device = SimulatedDevice(longest_pause=0.0, blocking=False)
    host, there = page_aligned(2 * PAGE), device.device_buffer(2 * PAGE)
    assert device.pin(host) and device.pins == 1 and device.pinned_bytes == 2 * PAGE
    with pytest.raises(StreamingError, match="pinned twice"):
        device.pin(host[PAGE:])
    device.unpin(host)
    assert device.pin(host) and device.pins == 2
    assert not SimulatedDevice(pinning_refused=True).pin(host)

    def unpin() -> float:
        device.unpin(host)
        return 0.0

    device._sleep = unpin  # type: ignore[method-assign,assignment]
    device.copy(host, there, device.copy_stream())
    device.copy_stream().drain()
    with pytest.raises(StreamingError, match="unpinned while it was copied"):
        device.close()


def test_a_source_that_changes_under_a_late_copy_is_a_fault() -> None:
    device = SimulatedDevice(longest_pause=0.0, blocking=False)
    host, there = torch.zeros(64, dtype=torch.uint8), device.device_buffer(64)
    device._sleep = lambda: host.fill_(1)  # type: ignore[method-assign,assignment,return-value]
    device.copy(there, host, device.copy_stream())
    device.copy_stream().drain()
    with pytest.raises(StreamingError, match="source of a copy was overwritten"):
        device.close()


# --- in a graph -------------------------------------------------------------------------------------------


def gradients(store: BoundaryStore | None, batches: int = 2) -> list[torch.Tensor]:
    """Of a stack of layers: two forwards, the first one's backward first, a graph dropped in between."""
    torch.manual_seed(3)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(6)]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for unit, weight in enumerate(weights):
            hidden = layer(hidden, weight) if store is None else Replayed.apply(store, unit, hidden, weight)
        return hidden.square().sum()

    for rows in (3, 50, 3):
        losses = [run(torch.randn(rows, 8, requires_grad=True)) for _ in range(batches)]
        dropped = run(torch.randn(7, 8))
        losses[0].backward()
        del dropped
        for loss in losses[1:]:
            loss.backward()
    return [weight.grad for weight in weights]  # type: ignore[misc]


@pytest.mark.parametrize("refused", [False, True])
def test_gradients_are_those_of_a_plain_graph(refused: bool) -> None:
    device, store = device_and_store(6, pinning_refused=refused)
    for found, expected in zip(gradients(store), gradients(None), strict=True):
        assert torch.equal(found, expected)
    store.close()
    device.close()


def test_gradients_with_boundaries_kept_are_those_of_a_plain_graph() -> None:
    for found, expected in zip(gradients(KeptBoundaries()), gradients(None), strict=True):
        assert torch.equal(found, expected)


# --- boundaries that stay ---------------------------------------------------------------------------------


def test_what_is_kept_in_pages_of_its_own_is_a_copy() -> None:
    large, weight = torch.randn(64 * PAGE // 8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    for store in (KeptBoundaries(), KeptBoundaries(copied=False)):
        weight.grad = None
        hidden = large * 1
        loss = Replayed.apply(store, 4, hidden, weight).square().sum()
        with torch.no_grad():
            hidden.zero_()
        if not store._copied:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            continue
        loss.backward()
        (expected,) = torch.autograd.grad(layer(large.detach(), weight).square().sum(), weight)
        assert torch.equal(weight.grad, expected)


def test_a_kept_boundary_serves_every_backward_that_autograd_allows() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    loss = Replayed.apply(KeptBoundaries(), 4, torch.randn(3, 8), weight).square().sum()
    loss.backward(retain_graph=True)
    first, weight.grad = weight.grad, None
    loss.backward()
    assert torch.equal(weight.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
