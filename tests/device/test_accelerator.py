"""The real device. What needs one is marked `accelerator`; what can be known without one comes first."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from device_tiers import UNITS, noise, tier_of
from lema.errors import DeviceError, StreamingError
from lema.storage.layout import PAGE
from lema.storage.views import page_aligned
from lema.streaming import accelerator as accelerator_module
from lema.streaming import pins as pins_module
from lema.streaming.accelerator import PIECE_BYTES, STAGING_BYTES, AcceleratorBackend, DeviceEvent, HostPins, cut
from lema.streaming.boundaries import BoundaryStore, Handle, KeptBoundaries, OffloadedBoundaries
from lema.streaming.schedule import AccessSchedule, Phase
from replayed import Replayed, layer
from simulated import SimulatedDevice, SimulatedEvent
from simulated_tiers import Run, Shape

pytestmark = pytest.mark.timeout(120)
needs_device = pytest.mark.accelerator


# --- without a device -------------------------------------------------------------------------------------


class FakeDriver:
    """The two functions of CUDA's runtime that pin, over a set of addresses."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.calls = 0
        self.answer = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        self.calls += 1
        if self.answer == 0:
            self.registered[address] = nbytes
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 713


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(pins_module, "_clear_error", lambda device: None)
    return driver


def test_memory_is_registered_once_and_exactly(driver: FakeDriver) -> None:
    pins, buffers = HostPins(torch.device("cuda:0")), [page_aligned(3 * PAGE - 5), page_aligned(PAGE)]
    assert [pins.add(buffer) for buffer in buffers] == ["", ""]
    assert sorted(driver.registered.values()) == [PAGE, 3 * PAGE]
    for again in (buffers[0], buffers[0][PAGE:], buffers[0][: 2 * PAGE]):
        with pytest.raises(StreamingError, match="pinned twice"):
            pins.add(again)
    assert driver.calls == 2
    assert pins.hold(buffers[0][5:-5]) and pins.hold(buffers[1]) and not pins.hold(page_aligned(1))
    pins.remove(buffers[0])
    pins.remove(buffers[0])
    assert not pins.hold(buffers[0][:1]) and list(driver.registered.values()) == [PAGE]
    pins.clear()
    assert driver.registered == {}
    assert pins.add(buffers[0]) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_registered_memory_is_not_shared_with_forked_children(driver: FakeDriver) -> None:
    pins, buffer = HostPins(torch.device("cuda:0")), page_aligned(64 * PAGE)

    def inherited() -> bool:
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = start <= buffer.data_ptr() < end
            elif inside and line.startswith("VmFlags:"):
                return " dc" not in line
        raise AssertionError("the buffer is in no mapping")

    assert inherited()
    pins.add(buffer)
    assert not inherited()
    pins.remove(buffer)
    assert inherited()


def test_what_the_driver_refuses_is_not_held(driver: FakeDriver) -> None:
    pins, buffer = HostPins(torch.device("cuda:0")), page_aligned(PAGE)
    driver.answer = 2
    assert "2" in pins.add(buffer) and not pins.hold(buffer)
    driver.answer = 0
    assert pins.add(buffer) == "" and pins.hold(buffer)
    assert "xpu" in HostPins(torch.device("xpu:0")).add(buffer)
    with pytest.raises(AssertionError):
        pins.add(page_aligned(PAGE)[8:])


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    missing = "xpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(DeviceError, match=missing):
        AcceleratorBackend(missing)


def test_an_event_that_never_comes_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(DeviceEvent):
        def query(self) -> bool:
            return False

    monkeypatch.setattr(accelerator_module, "_LONGEST_WAIT", 0.02)
    DeviceEvent(torch.device("cpu"), enable_timing=False).synchronize()  # never recorded is complete
    with pytest.raises(DeviceError, match="did not finish"):
        Never(torch.device("cpu"), enable_timing=False).synchronize()


def test_pieces_cover_everything_once() -> None:
    assert cut(0, 4) == []
    assert cut(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert STAGING_BYTES & (STAGING_BYTES - 1) == 0, "or torch's allocator of pinned memory rounds up"


def test_a_device_that_is_lost_is_told_to_everybody_and_its_host_slot_stays(tmp_path: Path) -> None:
    class Lost(SimulatedEvent):
        def synchronize(self) -> None:
            if threading.current_thread().name == "lema-returner":
                raise RuntimeError("device lost")
            super().synchronize()

    class LosesTheDevice(SimulatedDevice):
        def event(self) -> SimulatedEvent:
            return Lost()

    run = Run(tmp_path, Shape(1, units=5, depth=1), device=LosesTheDevice)
    with pytest.raises(RuntimeError, match="device lost"):
        run.sweep(AccessSchedule.training(5).accesses)
    assert run.end() == []


# --- on the device ----------------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Iterator[AcceleratorBackend]:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    if device.type == "mps":
        pytest.skip("torch has no streams for mps")
    backend = AcceleratorBackend(device)
    yield backend
    torch.accelerator.synchronize()
    backend.close()


@pytest.fixture
def busy(backend: AcceleratorBackend) -> Any:
    """Call it to give the compute stream milliseconds of work; allocates nothing."""
    for side in (128, 256, 512, 1024, 2048):  # the first that takes the device half a millisecond, or the last
        factors = [torch.randn(side, side, device=backend.device) / side**0.5 for _ in range(2)]
        product = torch.empty_like(factors[0])

        def work(times: int = 20) -> None:
            for _ in range(times):
                torch.mm(*factors, out=product)  # noqa: B023

        work(2)
        torch.accelerator.synchronize()
        clock = time.perf_counter()
        work(5)
        torch.accelerator.synchronize()
        if time.perf_counter() - clock > 0.0025:
            break
    return work


def pinned(backend: AcceleratorBackend, nbytes: int) -> torch.Tensor:
    buffer = page_aligned(nbytes)
    if not backend.pin(buffer):
        pytest.skip("pinning is refused here")
    return buffer


def wait(backend: AcceleratorBackend, *names: str) -> None:
    """Until the streams of these names, and the compute stream, have nothing left."""
    for stream in (*(backend.copy_stream(name) for name in names), backend.compute_stream()):
        event = backend.event()
        stream.record_event(event)
        event.synchronize()


@needs_device
def test_pinned_memory_is_copied_behind_work_without_blocking(backend: AcceleratorBackend, busy: Any) -> None:
    nbytes = 2 * PIECE_BYTES + 12345
    up, down, there = pinned(backend, nbytes), pinned(backend, nbytes), backend.device_buffer(nbytes)
    up[:nbytes].copy_(noise(nbytes))
    worked, arrived, streams = backend.event(), backend.event(), (backend.copy_stream(), backend.copy_stream("down"))
    assert up.is_pinned() and streams[0] != streams[1] and streams[0] == backend.copy_stream()
    busy(200)
    backend.compute_stream().record_event(worked)
    streams[0].wait_event(worked)
    backend.copy(there, up[:nbytes], streams[0])
    streams[0].record_event(arrived)
    streams[1].wait_event(arrived)
    backend.copy(down[:nbytes], there, streams[1])
    assert not worked.query(), "enqueuing a copy must not wait for the device"
    wait(backend, "down")
    assert torch.equal(down, up)


@needs_device
def test_pins_are_exact_and_undone(backend: AcceleratorBackend) -> None:
    buffer = pinned(backend, 3 * PAGE)
    for again in (buffer, buffer[PAGE:]):
        with pytest.raises(StreamingError, match="pinned twice"):
            backend.pin(again)
    backend.unpin(buffer)
    assert not buffer.is_pinned()
    assert backend.pin(buffer)
    backend.close()
    backend.close()
    assert not buffer.is_pinned()


@needs_device
def test_a_refused_pin_leaves_no_error_behind(backend: AcceleratorBackend, caplog: pytest.LogCaptureFixture) -> None:
    buffer = pinned(backend, 2 * PAGE)
    second = AcceleratorBackend(backend.device)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not second.pin(buffer), "it is registered already"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert torch.ones(4, device=backend.device).sum().item() == 4
    second.close()
    assert buffer.is_pinned()


@needs_device
def test_unpinned_memory_goes_through_staging(backend: AcceleratorBackend, busy: Any) -> None:
    for nbytes in (0, 1, STAGING_BYTES - 1, STAGING_BYTES, 3 * STAGING_BYTES + 77):
        content = noise(nbytes + 3)[3:]
        host, there = content.clone(), backend.device_buffer(nbytes)
        worked = backend.event()
        busy()
        backend.compute_stream().record_event(worked)
        stream = backend.copy_stream()
        stream.wait_event(worked)
        backend.copy(there, host, stream)
        host.zero_()  # read to the end when the call returns
        backend.copy(host, there, stream)
        assert torch.equal(host, content), f"{nbytes} bytes"


@needs_device
def test_a_device_buffer_is_aligned_and_nobody_elses(backend: AcceleratorBackend, busy: Any) -> None:
    nbytes = 64 << 20
    host = pinned(backend, nbytes)
    original = torch.arange(nbytes // 8, device=backend.device)
    busy(200)
    copy = original.clone()  # the device comes to this long after the lines below
    del original
    buffer = backend.device_buffer(nbytes)
    assert buffer.data_ptr() % 256 == 0 and buffer.dtype == torch.uint8
    backend.copy(buffer, host, backend.copy_stream())
    wait(backend, "weights")
    assert torch.equal(copy, torch.arange(nbytes // 8, device=backend.device))


@needs_device
def test_copies_leave_the_current_stream_of_every_thread_alone(backend: AcceleratorBackend) -> None:
    host, there = pinned(backend, 8 * PAGE), [backend.device_buffer(PAGE) for _ in range(8)]
    stream, wrong = backend.copy_stream(), []

    def work(number: int) -> None:
        before = torch.accelerator.current_stream(backend.device)
        for _ in range(50):
            backend.copy(there[number], host[number * PAGE : (number + 1) * PAGE], stream)
            if torch.accelerator.current_stream(backend.device) != before:
                wrong.append(number)

    host.copy_(noise(8 * PAGE))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    wait(backend, "weights")
    assert wrong == [] and torch.equal(torch.cat(there).cpu(), host)


# --- the tier ---------------------------------------------------------------------------------------------


@needs_device
@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "staged"])
def test_the_tier_brings_the_right_bytes_under_load(backend: AcceleratorBackend, busy: Any, pin: bool) -> None:
    contents = [noise((8 << 20) + 4096 * unit + unit, unit) for unit in range(UNITS)]
    accesses = [*AccessSchedule.training(UNITS).accesses] * 3
    seen = [torch.empty(len(contents[access.unit]), dtype=torch.uint8, device=backend.device) for access in accesses]
    with ThreadPoolExecutor(2) as pool:
        parts = tier_of(backend, pool, contents, pin)
        allocated = allocations(backend)
        for place, access in zip(seen, accesses, strict=True):
            slot = parts.tier.acquire(access.unit, access.phase)
            busy()
            place.copy_(parts.tier.buffers[slot][: len(place)])
            parts.tier.release(access.unit)
        assert allocations(backend) == allocated
        wait(backend, "weights")
        parts.tier.cache.close()
        parts.host.close()
        parts.tier.stop()
    for place, access in zip(seen, accesses, strict=True):
        assert torch.equal(place.cpu(), contents[access.unit]), f"{access}"
    assert parts.plan.accesses[0].phase is Phase.FORWARD


def allocations(backend: AcceleratorBackend) -> int:
    """Bytes ever asked of the device's allocator; 0 where torch does not count them."""
    module = torch.get_device_module(backend.device)
    if not hasattr(module, "memory_stats"):
        return 0
    return module.memory_stats(backend.device)["allocated_bytes.all.allocated"]


# --- boundaries -------------------------------------------------------------------------------------------


def storing(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch, refused: bool) -> OffloadedBoundaries:
    if refused:
        monkeypatch.setattr(HostPins, "add", lambda self, buffer: "refused for the test")
    return OffloadedBoundaries(backend, 4)


@needs_device
@pytest.mark.parametrize("refused", [False, True], ids=["pinned", "staged"])
def test_boundaries_come_back_in_any_order_under_load(
    backend: AcceleratorBackend, busy: Any, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, draw = storing(backend, monkeypatch, refused), random.Random(4)
    for shape, dtype in (((4, 512, 1000), torch.float32), ((2, 333, 77), torch.bfloat16), ((5, 900, 2048), torch.half)):
        kept, results = {}, []
        for unit in range(9):
            busy(5)
            hidden = torch.randn(shape, device=backend.device).to(dtype)
            hidden = hidden.transpose(1, 2) if unit % 3 == 0 else hidden
            kept[store.put(unit, hidden)] = hidden.clone()
            hidden.zero_()
            del hidden  # the allocator may give its memory away
            torch.full(shape, 7.0, device=backend.device, dtype=dtype)
        order = list(kept)
        draw.shuffle(order)
        for handle in order:
            found = store.get(handle)
            busy(5)
            assert found.stride() == kept[handle].stride()
            results.append((kept[handle], found.clone()))
            store.release(handle)
        torch.accelerator.synchronize()
        assert all(torch.equal(a, b) for a, b in results)
    store.close()


@needs_device
def test_boundaries_allocate_and_block_nothing_in_the_steady_state(backend: AcceleratorBackend, busy: Any) -> None:
    store = OffloadedBoundaries(backend, 8)
    hidden = [torch.randn(4, 512, 1024, device=backend.device) for _ in range(8)]
    seen = [torch.empty_like(hidden[0]) for _ in range(8)]

    def sweep() -> None:
        handles: list[Handle] = []
        for unit in range(8):
            busy(10)
            handles.append(store.put(unit, hidden[unit]))
        for unit in reversed(range(8)):
            found = store.get(handles[unit])
            busy(10)
            seen[unit].copy_(found)
            store.release(handles[unit])

    sweep()
    torch.accelerator.synchronize()
    allocated, host_bytes = allocations(backend), store.host_bytes
    for _ in range(4):
        for place in seen:
            place.zero_()
        worked = backend.event()
        busy(100)
        backend.compute_stream().record_event(worked)
        sweep()
        assert not worked.query(), "a sweep must be enqueued while the device is still busy before it"
        torch.accelerator.synchronize()
        assert allocations(backend) == allocated
    assert all(torch.equal(a, b) for a, b in zip(seen, hidden, strict=True))
    assert store.host_bytes == host_bytes == 8 * 4 * 512 * 1024 * 4 and store.late_fetches == 0
    store.close()


@needs_device
@pytest.mark.parametrize("kind", ["kept", "pinned", "staged"])
def test_gradients_with_boundaries_away_are_those_of_a_plain_graph(
    backend: AcceleratorBackend, busy: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(store: BoundaryStore | None) -> list[torch.Tensor]:
        torch.manual_seed(3)
        weights = [torch.randn(256, 256, device=backend.device) / 16 for _ in range(8)]
        for weight in weights:
            weight.requires_grad_()
        for rows in (300, 3000, 300):
            losses = []
            for _ in range(2):
                hidden = torch.randn(rows, 256, device=backend.device)
                for unit, weight in enumerate(weights):
                    busy(3)
                    if store is None:
                        hidden = layer(hidden, weight)
                    else:
                        hidden = Replayed.apply(store, unit, hidden, weight)
                losses.append(hidden.square().mean())
            for loss in losses:
                loss.backward()
        return [weight.grad for weight in weights]  # type: ignore[misc]

    store = KeptBoundaries() if kind == "kept" else storing(backend, monkeypatch, kind == "staged")
    found = gradients(store)
    for one, other in zip(found, gradients(None), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    store.close()


@needs_device
def test_a_saved_reference_to_an_overwritten_stage_raises(backend: AcceleratorBackend) -> None:
    store = OffloadedBoundaries(backend, 3)
    handles = [store.put(unit, torch.ones(3, device=backend.device)) for unit in range(3)]
    weight = torch.ones(3, device=backend.device, requires_grad=True)
    loss = (weight * store.get(handles[2])).sum()
    store.release(handles[2])
    store.get(handles[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    store.close()


@needs_device
def test_a_host_thread_that_waits_takes_no_core(backend: AcceleratorBackend, busy: Any) -> None:
    event = backend.event()
    busy(1000)
    backend.compute_stream().record_event(event)
    clock, cpu = time.perf_counter(), time.thread_time()
    event.synchronize()
    waited = time.perf_counter() - clock
    if waited > 0.05:
        assert time.thread_time() - cpu < 0.5 * waited
